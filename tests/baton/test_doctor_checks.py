"""`baton doctor` says what it saw; a probe that crashes is a finding, not a crash."""

from __future__ import annotations

import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from baton import doctor_checks, doctor_probe
from baton.doctor_checks import Finding, Verdict, check_ports, check_redis, probe, read_rows
from baton.doctor_probe import probe_ucx
from cluster.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let probes run a program of the test's instead."""
    real = subprocess.run

    def answer(program: str, **options: Any) -> None:
        def run(command: list[str], **arguments: Any) -> Any:
            return real([sys.executable, "-c", program], **(arguments | options))

        monkeypatch.setattr(subprocess, "run", run)

    return answer


def test_the_rows_of_a_probe_are_its_findings(answering: Callable[..., None]) -> None:
    answering('print(\'a banner\'); print(\'[["torch", "ok", "2.0"]]\')')
    assert probe("torch") == [Finding("torch", Verdict.OK, "2.0")]


def test_a_probe_that_crashes_is_a_problem_with_its_last_words(
    answering: Callable[..., None],
) -> None:
    answering("import sys; sys.exit('no driver')")
    (finding,) = probe("torch")
    assert finding.verdict is Verdict.PROBLEM
    assert "no driver" in finding.detail


def test_a_probe_that_hangs_is_a_problem(answering: Callable[..., None]) -> None:
    answering("import signal; signal.pause()", timeout=0.01)
    (finding,) = probe("ucx")
    assert finding.verdict is Verdict.PROBLEM
    assert "no answer" in finding.detail


@pytest.mark.parametrize("output", ["", "hello", "[[1, 2]]", '[["a", "splendid", "b"]]', "5"])
def test_a_probe_that_does_not_answer_in_rows_is_a_problem(output: str) -> None:
    (finding,) = read_rows("torch", output)
    assert finding.verdict is Verdict.PROBLEM


def test_a_port_in_use_is_a_warning_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(doctor_checks, "DEFAULT_PORTS", {port: "public HTTP"})
        (finding,) = check_ports()
    assert finding.verdict is Verdict.WARNING
    assert finding.detail == f"{port} is in use (public HTTP takes another)"


def test_what_a_gateway_does_without_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> NoReturn:
        raise ConfigError("No redis-server was found.")

    monkeypatch.setattr(doctor_checks, "find_redis_server", missing)
    assert [finding.verdict for finding in check_redis()] == [Verdict.WARNING]
    monkeypatch.setattr(doctor_probe, "_load", lambda name: ModuleNotFoundError(name=name))
    for is_there, verdict in ((True, "problem"), (False, "warning")):
        monkeypatch.setattr(doctor_probe, "_can_run_nodes", lambda there=is_there: there)
        assert [row[1] for row in probe_ucx()] == [verdict]


@pytest.mark.slow
def test_ucx_delivers_a_message_to_itself() -> None:
    delivery, transports = probe_ucx()
    assert delivery[1] == transports[1] == "ok"
    assert "tcp" in transports[2]
