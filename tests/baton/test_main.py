"""The `baton` command: each mistake has its exit code, and is said once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from baton.__main__ import (
    EXIT_BROKEN_PIPE,
    EXIT_CONFIG,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    PROGRAMS,
    main,
)
from cluster.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException | int], list[list[str]]]:
    """Put a program in the place of `baton doctor`; gives the arguments it was called with."""

    def replace(outcome: BaseException | int) -> list[list[str]]:
        calls: list[list[str]] = []

        def run(argv: Sequence[str]) -> int:
            calls.append(list(argv))
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        module = ModuleType("baton.doctor")
        module.main = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "baton.doctor", module)
        return calls

    return replace


def test_a_program_gets_its_arguments_and_its_exit_code_is_ours(doctor: Callable[..., Any]) -> None:
    calls = doctor(4)
    assert main(["doctor", "--json", "x"]) == 4
    assert calls == [["--json", "x"]]


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError("no such folder"), EXIT_CONFIG), (UsageError("what?"), 2)]
)
def test_a_mistake_is_one_line_with_the_exit_code_of_its_kind(
    doctor: Callable[..., Any], capsys: pytest.CaptureFixture[str], error: ConfigError, code: int
) -> None:
    doctor(error)
    assert main(["doctor"]) == code
    assert capsys.readouterr().err == f"baton doctor: {error.message}\n"


@pytest.mark.parametrize("named", ["baton doctor", "baton doctor run"])
def test_a_message_that_names_its_program_names_it_once(
    doctor: Callable[..., Any], capsys: pytest.CaptureFixture[str], named: str
) -> None:
    doctor(UsageError(f"{named}: unknown flag --hurry."))
    main(["doctor"])
    assert capsys.readouterr().err == f"{named}: unknown flag --hurry.\n"


@pytest.mark.parametrize("typed", ["bench compare a.json a.json", "--help", "admin --help"])
def test_a_reader_that_leaves_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str
) -> None:
    result = tmp_path / "a.json"
    result.write_text(json.dumps({"schema_version": 1, "completed": 1, "failed": 0}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "baton", *typed.split()]
    ended = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, check=False)
    os.close(write_end)
    assert (ended.returncode, ended.stderr) == (EXIT_BROKEN_PIPE, b"")


def test_another_pipe_that_breaks_is_an_error(doctor: Callable[..., Any]) -> None:
    doctor(BrokenPipeError())
    with pytest.raises(BrokenPipeError):
        main(["doctor"])


def test_a_package_that_is_missing_is_named_with_what_brings_it(
    doctor: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    doctor(ModuleNotFoundError("No module named 'torch'", name="torch"))
    assert main(["doctor"]) == EXIT_CONFIG
    message = capsys.readouterr().err
    assert "'torch'" in message
    assert "pip install" in message


def test_a_missing_module_of_our_own_is_a_defect_and_not_hidden(doctor: Callable[..., Any]) -> None:
    doctor(ModuleNotFoundError("No module named 'engine.gone'", name="engine.gone"))
    with pytest.raises(ModuleNotFoundError):
        main(["doctor"])


def test_an_interrupt_is_no_traceback(doctor: Callable[..., Any]) -> None:
    doctor(KeyboardInterrupt())
    assert main(["doctor"]) == EXIT_INTERRUPTED


def test_help_lists_every_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {program.name} " in text for program in PROGRAMS)


def test_no_command_and_an_unknown_one_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == EXIT_USAGE
    assert main(["destroy"]) == EXIT_USAGE
    assert "'destroy'" in capsys.readouterr().err


def test_the_version_is_that_of_the_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    name, version = capsys.readouterr().out.split()
    assert name == "baton"
    assert version[0].isdigit()
