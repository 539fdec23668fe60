"""The checker sees what is wrong with a history, and the nemesis what it failed to do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from tests.faults.accounts import Account, beyond_budget, disagreements
from tests.faults.checker import (
    FREED_WITHIN_SECONDS,
    hung,
    not_freed,
    silences,
    violations,
    wrong_tokens,
)
from tests.faults.history import NO_REQUEST, Answer, Event, History, Usage, read_history
from tests.faults.leaks import Held, held_by_node, more_than
from tests.faults.metrics import parse
from tests.faults.nemesis import NotInjected, draw_schedule, is_gone, process_state, verify

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

ORACLE = {0: Answer((5, 6, 7), "length", 4)}


def history_of(
    *events: tuple[str, tuple[int, ...], str], usages: Sequence[Usage] | None = None
) -> History:
    """`usages`: come with `finished`. None: the right one, of the tokens so far."""
    history = History()
    history.record(0, "sent")
    for kind, token_ids, detail in events:
        history.record(0, kind, token_ids=token_ids, detail=detail)
        if kind == "finished":
            count = len(history.tokens_of(0))
            for usage in [Usage(4, count, 4 + count, 0)] if usages is None else usages:
                history.record(0, "usage", usage=usage)
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


@pytest.mark.parametrize(
    ("usages", "problem"),
    [
        ([Usage(4, 3, 7, 3)], None),
        ([], "0 usages"),
        ([Usage(4, 3, 7, 0), Usage(4, 3, 7, 0)], "2 usages"),
        ([Usage(6, 3, 9, 0)], "usage counts 6 tokens of a prompt of 4"),
        ([Usage(4, 2, 6, 0)], "usage counts 2 of 3 tokens"),
        ([Usage(4, 3, 8, 0)], "usage adds 4 and 3 up to 8"),
        ([Usage(4, 3, 7, 4)], "usage calls 4 tokens of a prompt of 4 cached"),
        ([Usage(4, 3, 7, -1)], "usage calls -1 tokens of a prompt of 4 cached"),
    ],
)
def test_a_usage_that_is_not_what_the_client_got_is_named(
    usages: list[Usage], problem: str | None
) -> None:
    history = history_of(("tokens", (5, 6, 7), ""), FINISHED, DONE, usages=usages)
    assert violations(history, ORACLE) == ([] if problem is None else [f"request 0: {problem}"])


def test_an_end_for_another_reason_than_the_oracles_is_named() -> None:
    history = history_of(("tokens", (5, 6, 7), ""), ("finished", (), "stop"), DONE)
    assert violations(history, ORACLE) == ["request 0: finished by stop, not by length"]


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


def test_only_those_who_touched_the_fault_may_err_or_lose_their_connection() -> None:
    failed = history_of(LOST, DONE)
    assert violations(failed, ORACLE, may_err={0}) == []
    assert violations(failed, ORACLE, may_err={1}) == ["request 0: erred, but touched no fault"]
    broken = history_of(("tokens", (5,), ""), ("broken", (), "ReadError"))
    assert violations(broken, ORACLE, may_break={0}) == []
    wrong = history_of(("tokens", (6,), ""), ("broken", (), "ReadError"))
    assert violations(wrong, ORACLE, may_break={0}) == ["request 0: token 0 is not the oracle's"]


def test_requests_with_a_wrong_token_or_without_an_end_are_counted() -> None:
    assert wrong_tokens(history_of(("tokens", (5, 7), ""), LOST), ORACLE) == 1
    assert wrong_tokens(history_of(("tokens", (5, 6), ""), LOST), ORACLE) == 0
    assert hung(history_of(("tokens", (5,), ""))) == 1
    assert hung(history_of(("hung", (), ""))) == 1
    assert hung(history_of(LOST)) == 0


def test_what_a_witness_objects_to_is_a_violation() -> None:
    history = history_of(LOST, DONE)
    history.record(NO_REQUEST, "contradiction", detail="decode-0: I3, block 1")
    assert violations(history, ORACLE) == ["decode-0: I3, block 1"]


def test_a_long_silence_while_somebody_waits_is_a_violation() -> None:
    history = History()
    for request, kind, at in ((0, "sent", 0.0), (0, "tokens", 9.0), (0, "failed", 21.0)):
        history.add(Event(request, kind, at))
    history.add(Event(NO_REQUEST, "fault", 30.0))
    history.add(Event(1, "sent", 99.0))
    assert silences(history, 12.0) == []
    assert silences(history, 11.0) == ["nobody heard anything for 12.0 s"]


@pytest.mark.parametrize(
    ("freed", "fault", "is_right"),
    [
        ([(12.0, "ask-0 decode-0")], "", True),
        ([], "", False),
        ([(12.0, "ask-0 decode-1")], "", False),
        ([(12.0, "ask-1 decode-0")], "", False),
        ([(10.5 + FREED_WITHIN_SECONDS, "ask-0 decode-0")], "", False),
        ([(0.5, "ask-0 decode-0")], "", False),
        ([], "kill decode-0 7", True),
        ([], "kill decode-1 7", False),
    ],
)
def test_blocks_of_who_has_left_must_come_back_in_time(
    freed: list[tuple[float, str]], fault: str, is_right: bool
) -> None:
    history = History()
    history.add(Event(NO_REQUEST, "held", 1.0, detail="ask-0 decode-0"))
    history.add(Event(NO_REQUEST, "held", 1.0, detail="ask-2 decode-0"))  # has not left
    history.add(Event(0, "left", 10.0))
    for at, detail in freed:
        history.add(Event(NO_REQUEST, "freed", at, detail=detail))
    if fault:
        history.record(NO_REQUEST, "fault", detail=fault)
    assert (not_freed(history) == []) is is_right


@pytest.mark.parametrize(("num_again", "is_right"), [(20, True), (21, False)])
def test_more_dispatches_than_the_budget_are_found(num_again: int, is_right: bool) -> None:
    """One request adds a tenth; two gateways have saved ten each."""
    counted = Account(1, Counter(), Counter(redispatch=num_again))
    assert (beyond_budget(history_of(LOST), counted) == []) is is_right


def test_a_history_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    history = history_of(("tokens", (5, 6, 7), ""), FINISHED, DONE)
    history.record(NO_REQUEST, "fault", detail="kill decode-0 12")
    path = tmp_path / "history.jsonl"
    history.write(path)
    again = read_history(path.read_text().splitlines())
    assert again.events == history.events
    assert (again.num_tokens, again.num_ended) == (3, 1)
    assert again.answer_of(0) == ORACLE[0]
    assert violations(again, ORACLE) == []


@pytest.mark.parametrize(
    ("num_ended", "errors", "problem"),
    [
        (1, {"node_lost": 1}, None),
        (0, {"node_lost": 1}, "1 requests sent, 0 counted"),
        (1, {}, "1 clients saw node_lost, 0 are counted"),
        (1, {"node_lost": 2}, "1 clients saw node_lost, 2 are counted"),
        (1, {"node_lost": 1, "internal": 1}, "0 clients saw internal, 1 are counted"),
        (1, {"node_lost": 1, "cancelled": 1}, "0 clients saw cancelled, 1 are counted"),
    ],
)
def test_counters_that_differ_from_what_clients_saw_are_found(
    num_ended: int, errors: dict[str, int], problem: str | None
) -> None:
    counted = Account(num_ended, Counter(errors), Counter())
    found = disagreements(history_of(LOST, DONE), counted)
    assert found == ([] if problem is None else [problem])


IDLE_NODE = """
baton_kv_blocks{state="free"} 90
baton_kv_blocks{state="cached"} 10
baton_kv_blocks{state="used"} 0
baton_kv_blocks{state="quarantined"} 0
baton_kv_staging_slots{state="free"} 8
baton_kv_staging_slots{state="taken"} 0
baton_kv_staging_slots{state="lost"} 0
baton_kv_lost_blocks 0
baton_sequences_running 0
baton_sequences_waiting 0
baton_queued_tokens 0
baton_kv_transfers_in_flight 0
"""


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('baton_kv_blocks{state="used"} 1', "1 blocks used"),
        ('baton_kv_blocks{state="quarantined"} 2', "2 blocks quarantined"),
        ("baton_sequences_running 3", "baton_sequences_running is 3"),
        ("baton_kv_transfers_in_flight 4", "baton_kv_transfers_in_flight is 4"),
        ('baton_kv_staging_slots{state="taken"} 1', "1 staging slots taken"),
        ("baton_kv_lost_blocks 9", "baton_kv_lost_blocks is 9"),
    ],
)
def test_what_a_node_still_holds_is_a_leak(line: str, problem: str) -> None:
    assert list(held_by_node(parse(IDLE_NODE))) == []
    name = line.rpartition(" ")[0]
    text = "\n".join(line if old.startswith(name) else old for old in IDLE_NODE.splitlines())
    assert list(held_by_node(parse(text))) == [problem]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("baton_queued_tokens", "baton_queued_tokens is not told"),
        ('baton_kv_staging_slots{state="lost"}', "nothing is told of staging slots lost"),
    ],
)
def test_what_a_node_does_not_tell_any_more_is_not_taken_for_nothing(
    name: str, problem: str
) -> None:
    text = "\n".join(line for line in IDLE_NODE.splitlines() if not line.startswith(name))
    assert list(held_by_node(parse(text))) == [problem]


def test_descriptors_threads_and_tasks_beyond_a_bound_are_leaks() -> None:
    idle = Held(num_descriptors=30, num_threads=10, num_tasks=5, resident_bytes=1)
    assert list(more_than(idle, idle)) == []
    grown = Held(num_descriptors=99, num_threads=99, num_tasks=99, resident_bytes=1)
    assert len(list(more_than(idle, grown))) == 3


def test_the_same_seed_draws_the_same_schedule() -> None:
    faults = [("kill", "a"), ("stall", "b")]
    first = draw_schedule(3, 20, faults, pause=(0.0, 1.0))
    assert first == draw_schedule(3, 20, faults, pause=(0.0, 1.0))
    assert first != draw_schedule(4, 20, faults, pause=(0.0, 1.0))
