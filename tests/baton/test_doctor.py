"""`baton doctor` says what it saw; a probe that crashes is a finding, not a crash."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from baton import doctor
from baton.doctor import EXIT_NOT_READY, Finding, Verdict, check_ports, probe, read_rows
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
        monkeypatch.setattr(doctor, "DEFAULT_PORTS", {port: "public HTTP"})
        (finding,) = check_ports()
    assert finding.verdict is Verdict.WARNING
    assert finding.detail == f"{port} is in use (public HTTP takes another)"


@pytest.mark.parametrize(("verdict", "code"), [(Verdict.WARNING, 0), (Verdict.PROBLEM, 4)])
def test_the_exit_code_says_whether_there_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verdict: Verdict, code: int
) -> None:
    assert EXIT_NOT_READY == 4
    finding = Finding("Redis", verdict, "[Errno 98] in use [/here]")
    monkeypatch.setattr(doctor, "examine", lambda: [finding])
    assert doctor.main(["-o", "json"]) == code
    printed = json.loads(capsys.readouterr().out)
    assert printed["findings"] == [
        {"subject": "Redis", "verdict": verdict.value, "detail": finding.detail}
    ]
    assert printed["metadata"]
    assert doctor.main([]) == code
    shown = capsys.readouterr().out
    assert finding.detail in shown, "brackets are text, not markup"
    last = "Redis: mend this first." if code else "Baton can run here."
    assert shown.splitlines()[-1] == last


@pytest.mark.slow
def test_ucx_delivers_a_message_to_itself() -> None:
    delivery, transports = probe_ucx()
    assert delivery[1] == transports[1] == "ok"
    assert "tcp" in transports[2]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--listen", "here"),
        ("--listen", "127.0.0.1:99999"),
        ("--to", "host:port"),
        ("--device", "gpu0"),
    ],
)
def test_an_address_or_device_that_is_none_is_refused_by_name(arguments: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=f"{arguments[0]}: must be"):
        doctor.main(arguments)


def test_a_pair_that_was_asked_for_and_not_measured_is_a_problem(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: [Finding("torch", Verdict.OK, "2.0")])
    assert doctor.main([]) == 0
    assert doctor.main(["--to", "127.0.0.1:1"]) == EXIT_NOT_READY
