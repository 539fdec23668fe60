"""The checker sees what is wrong with a history, and the nemesis what it failed to do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.faults.checker import violations
from tests.faults.history import History
from tests.faults.nemesis import NotInjected, is_gone, process_state, verify

ORACLE = {0: (5, 6, 7)}


def history_of(*events: tuple[str, tuple[int, ...], str]) -> History:
    history = History()
    history.record(0, "sent")
    for kind, token_ids, detail in events:
        history.record(0, kind, token_ids=token_ids, detail=detail)
    return history


FINISHED, DONE = ("finished", (), "length"), ("done", (), "")
LOST = ("failed", (), "node_lost")


@pytest.mark.parametrize(
    "events",
    [
        [("tokens", (5, 6), ""), ("tokens", (7,), ""), FINISHED, DONE],
        [("tokens", (5, 6), ""), LOST, DONE],
        [LOST, DONE],
        [("refused", (), "no_capacity")],
        [("tokens", (5,), ""), ("left", (), "")],
    ],
)
def test_a_right_history_has_no_violations(events: list[tuple[str, tuple[int, ...], str]]) -> None:
    assert violations(history_of(*events), ORACLE) == []


@pytest.mark.parametrize(
    ("events", "problem"),
    [
        ([("tokens", (5, 6), "")], "0 endings"),
        ([("tokens", (5, 6, 7), ""), FINISHED, LOST, DONE], "2 endings"),
        ([("tokens", (5, 6), ""), FINISHED, DONE], "finished with 2 of 3 tokens"),
        ([("tokens", (5, 7), ""), LOST, DONE], "token 1 is not the oracle's"),
        ([("tokens", (5, 6, 7, 8), ""), FINISHED], "token 3 is not the oracle's"),
        ([("tokens", (5, 5), ""), LOST], "token 1 is not the oracle's"),
        ([LOST, ("tokens", (5,), "")], "tokens after the ending"),
        ([("failed", (), "internal"), DONE], "ended with internal"),
        ([LOST, DONE, DONE], "[DONE] is not the last line"),
        ([("hung", (), "")], "hung"),
        ([("broken", (), "ReadError")], "its connection broke"),
    ],
)
def test_a_wrong_history_is_named(
    events: list[tuple[str, tuple[int, ...], str]], problem: str
) -> None:
    assert f"request 0: {problem}" in violations(history_of(*events), ORACLE)


def test_a_request_that_was_never_sent_and_one_that_nobody_expects_are_named() -> None:
    history = History()
    history.record(3, "sent")
    assert violations(history, ORACLE) == [
        "request 0: was never sent",
        "request 3: not known to the oracle",
    ]


def test_a_fault_that_misses_is_loud(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.faults.nemesis.INJECTED_WITHIN_SECONDS", 0.0)
    with pytest.raises(NotInjected, match="it missed"):
        verify(lambda: process_state(os.getpid()) == "T", "it missed")


def test_the_state_of_a_process_is_read_from_the_system() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert not is_gone(process.pid)
    process.send_signal(signal.SIGSTOP)
    verify(lambda: process_state(process.pid) == "T", "not stopped")
    process.kill()
    verify(lambda: is_gone(process.pid), "not gone")
    process.communicate()
