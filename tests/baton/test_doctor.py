"""`baton doctor` does what it was asked for, and its exit code says whether all is well."""

from __future__ import annotations

import json

import pytest

from baton import doctor
from baton.doctor import EXIT_NOT_READY
from baton.doctor_checks import Finding, Verdict
from cluster.errors import ConfigError


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


@pytest.mark.parametrize(
    "arguments",
    [
        ("--listen", "here"),
        ("--listen", "127.0.0.1:99999"),
        ("--listen", "a b:1"),
        ("--to", "host:port"),
        ("--to", ":9300"),
        ("--to", "host:0"),
        ("--device", "gpu0"),
    ],
)
def test_an_address_or_device_that_is_none_is_refused_by_name(arguments: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=f"{arguments[0]}: must be"):
        doctor.main(arguments)


def test_a_pair_that_was_asked_for_and_not_measured_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: [Finding("torch", Verdict.OK, "2.0")])
    assert doctor.main([]) == 0
    capsys.readouterr()
    assert doctor.main(["--to", "127.0.0.1:1"]) == EXIT_NOT_READY
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "Baton can run here, but this was not measured: this machine to 127.0.0.1:1."
