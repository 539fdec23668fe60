"""Whatever order events come in, a sequence has one ending and its tokens come in order."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from cluster.errors import (
    Cancelled,
    DeadlineExceeded,
    InternalError,
    NodeLost,
    ServingError,
    TransferFailed,
)
from cluster.request import FinishReason, TokenDelta
from gateway.retries import is_worth_a_retry
from gateway.sequence_instructions import (
    AskDecode,
    CancelDecode,
    CancelPrefill,
    Deliver,
    Instruction,
    Patience,
)
from gateway.sequence_machine import ORPHAN_SECONDS, SequenceMachine, SequenceState


def delta(*token_ids: int, **fields: object) -> TokenDelta:
    return TokenDelta(sequence_id="s", token_ids=token_ids, **fields)  # type: ignore[arg-type]


def machine(*, has_prefill: bool = True, **fields: object) -> SequenceMachine:
    return SequenceMachine("s", has_prefill=has_prefill, now=0.0, **fields)  # type: ignore[arg-type]


def tokens(instructions: list[Instruction]) -> list[int]:
    return [t for i in instructions if isinstance(i, Deliver) for t in i.delta.token_ids]


def endings(instructions: list[Instruction]) -> list[FinishReason | ServingError]:
    found: list[FinishReason | ServingError] = []
    for instruction in instructions:
        if isinstance(instruction, Deliver):
            ending = instruction.delta.error or instruction.delta.finish_reason
            if ending is not None:
                found.append(ending)
    return found


FIRST = delta(1, num_cached_tokens=16)
HANDED_OFF = delta(handed_off=True)
STARTED = delta(started=True, num_cached_tokens=0)
SECOND = delta(2)
LAST = delta(3, finish_reason=FinishReason.LENGTH)

Event = Callable[[SequenceMachine], list[Instruction]]
EVENTS: dict[str, Event] = {
    "P first": lambda m: m.prefill_delta(FIRST, 1.0),
    "P handed off": lambda m: m.prefill_delta(HANDED_OFF, 1.0),
    "P error": lambda m: m.prefill_delta(delta(error=TransferFailed("x")), 1.0),
    "P lost": lambda m: m.prefill_lost(1.0),
    "D started": lambda m: m.decode_delta(STARTED, 1.0),
    "D second": lambda m: m.decode_delta(SECOND, 1.0),
    "D last": lambda m: m.decode_delta(LAST, 1.0),
    "D error": lambda m: m.decode_delta(delta(error=TransferFailed("y")), 1.0),
    "D lost": lambda m: m.decode_lost(1.0),
    "cancel": lambda m: m.cancel(),
    "tick": lambda m: m.tick(1.0),
}
# What each node sends comes in its own order; the two may interleave in any way.
PREFILL_ORDERS = [
    ["P first", "P handed off"],
    ["P first", "P error"],
    ["P first", "P lost"],
    ["P first", "P handed off", "P lost"],
    ["P error"],
    ["P lost"],
]
DECODE_ORDERS = [
    ["D started", "D second", "D last"],
    ["D started", "D second", "D lost"],
    ["D started", "D error"],
    ["D error"],
    ["D lost"],
    [],
]
OURS = [[], ["cancel"], ["tick"]]


def interleavings(*lanes: list[str]) -> list[tuple[str, ...]]:
    marks = [index for index, lane in enumerate(lanes) for _ in lane]
    found = set()
    for order in set(itertools.permutations(marks)):
        positions = [iter(lane) for lane in lanes]
        found.add(tuple(next(positions[index]) for index in order))
    return sorted(found)


CASES = [
    case
    for lanes in itertools.product(PREFILL_ORDERS, DECODE_ORDERS, OURS)
    for case in interleavings(*lanes)
]


@pytest.mark.parametrize("may_recompute", [False, True])
def test_every_order_of_events_has_at_most_one_ending_and_tokens_in_order(
    may_recompute: bool,
) -> None:
    for case in CASES:
        subject = machine(may_recompute=may_recompute)
        seen: list[Instruction] = []
        for name in case:
            was_finished = subject.is_finished
            fresh = EVENTS[name](subject)
            assert not (was_finished and fresh), case
            seen += fresh
        seen += subject.tick(1.0 + ORPHAN_SECONDS)
        assert tokens(seen) == [1, 2, 3][: len(tokens(seen))], case
        num_endings = len(endings(seen))
        is_silent = "cancel" in case and num_endings == 0
        assert num_endings == (0 if is_silent else int(subject.is_finished)), case
        if "P lost" in case or "D lost" in case or "P error" in case or "D error" in case:
            assert subject.is_finished or {"P first", "D started"} <= set(case), case


def test_an_undisturbed_sequence_ends_well_in_every_order() -> None:
    lanes = (["P first", "P handed off"], ["D started", "D second", "D last"])
    for case in interleavings(*lanes):
        subject = machine()
        seen = [i for name in case for i in EVENTS[name](subject)]
        assert tokens(seen) == [1, 2, 3], case
        assert endings(seen) == [FinishReason.LENGTH], case


def test_losing_either_node_always_reaches_the_other_or_the_client() -> None:
    for case in CASES:
        subject = machine()
        seen: list[Instruction] = []
        for name in case:
            before = subject.state
            fresh = EVENTS[name](subject)
            seen += fresh
            if name == "D lost" and before is not SequenceState.FINISHED:
                assert isinstance(endings(fresh)[0], NodeLost), case
            if name == "P lost" and before is SequenceState.SUBMITTED:
                assert isinstance(endings(fresh)[0], NodeLost), case
                assert CancelDecode() in fresh, case
            if name == "P lost" and before is SequenceState.PREFILLED:
                assert fresh == [AskDecode()], case


def test_what_the_decode_node_sends_waits_for_the_first_token() -> None:
    subject = machine()
    assert subject.decode_delta(STARTED, 1.0) == []
    assert subject.decode_delta(SECOND, 1.0) == []
    assert tokens(subject.prefill_delta(FIRST, 2.0)) == [1, 2]


def test_a_prefill_node_lost_after_start_costs_nothing() -> None:
    subject = machine()
    subject.prefill_delta(FIRST, 1.0)
    subject.decode_delta(STARTED, 1.0)
    assert subject.prefill_lost(2.0) == []
    assert endings(subject.decode_delta(LAST, 3.0)) == [FinishReason.LENGTH]


def test_a_prefill_error_after_start_costs_nothing() -> None:
    subject = machine()
    subject.prefill_delta(FIRST, 1.0)
    subject.decode_delta(STARTED, 1.0)
    assert subject.prefill_delta(delta(error=TransferFailed("late")), 2.0) == []
    assert not subject.is_finished


def test_a_hand_off_whose_prefill_node_does_not_know_its_end_goes_on_where_decode_started() -> None:
    """The link broke behind the commit, which had arrived."""
    subject = machine()
    subject.prefill_delta(FIRST, 1.0)
    unknown = TransferFailed("It was lost.", reason="commit_unknown")
    assert subject.prefill_delta(delta(error=unknown), 1.0) == [AskDecode()]
    seen = [i for told in (STARTED, SECOND, LAST) for i in subject.decode_delta(told, 2.0)]
    assert tokens(seen) == [2, 3]
    assert endings(seen) == [FinishReason.LENGTH]


@pytest.mark.parametrize("answer", ["D error", "D lost", "nothing"])
def test_a_hand_off_that_failed_after_the_first_token_ends_when_decode_does_not_run_it(
    answer: str,
) -> None:
    subject = machine()
    subject.prefill_delta(FIRST, 1.0)
    told = TransferFailed("It was lost.", reason="commit_unknown")
    subject.prefill_delta(delta(error=told), 1.0)
    seen = [] if answer == "nothing" else EVENTS[answer](subject)
    seen += subject.tick(1.0 + ORPHAN_SECONDS)
    (error,) = endings(seen)
    assert isinstance(error, NodeLost if answer == "D lost" else TransferFailed)
    assert CancelDecode() in seen


def test_a_hand_off_that_failed_before_the_first_token_ends_at_once() -> None:
    seen = EVENTS["P error"](machine())
    assert isinstance(endings(seen)[0], TransferFailed)


def test_a_first_token_lost_with_its_node_ends_the_sequence_even_when_decode_started() -> None:
    subject = machine()
    subject.decode_delta(STARTED, 1.0)
    seen = subject.prefill_lost(2.0)
    assert isinstance(endings(seen)[0], NodeLost)
    assert CancelDecode() in seen


def test_an_orphan_that_decode_answers_for_goes_on() -> None:
    subject = machine()
    subject.prefill_delta(FIRST, 1.0)
    assert subject.prefill_lost(2.0) == [AskDecode()]
    subject.decode_delta(STARTED, 2.0 + ORPHAN_SECONDS - 0.1)
    assert subject.tick(2.0 + ORPHAN_SECONDS + 60.0) == []


def test_an_orphan_without_an_answer_ends_in_time() -> None:
    subject = machine()
    subject.prefill_delta(FIRST, 1.0)
    subject.prefill_lost(2.0)
    assert subject.tick(2.0 + ORPHAN_SECONDS - 0.01) == []
    seen = subject.tick(2.0 + ORPHAN_SECONDS)
    assert isinstance(endings(seen)[0], NodeLost)
    assert CancelDecode() in seen


def test_an_orphan_that_decode_refuses_ends_with_its_error() -> None:
    subject = machine()
    subject.prefill_delta(FIRST, 1.0)
    subject.prefill_lost(2.0)
    seen = subject.decode_delta(delta(error=TransferFailed("no KV")), 2.5)
    assert isinstance(endings(seen)[0], TransferFailed)


def test_a_decode_error_stops_a_prefill_that_still_runs() -> None:
    seen = machine().decode_delta(delta(error=TransferFailed("digest")), 1.0)
    assert CancelPrefill() in seen


def test_a_first_token_that_ends_the_sequence_needs_no_decode_node() -> None:
    subject = machine()
    seen = subject.prefill_delta(delta(1, finish_reason=FinishReason.STOP, stop_token_id=1), 1.0)
    assert endings(seen) == [FinishReason.STOP]
    assert subject.decode_lost(2.0) == []


def test_a_second_token_from_the_prefill_node_is_refused() -> None:
    subject = machine()
    subject.prefill_delta(FIRST, 1.0)
    assert isinstance(endings(subject.prefill_delta(SECOND, 1.0))[0], InternalError)


def test_cancel_reaches_both_nodes_before_the_hand_off_and_one_after() -> None:
    subject = machine()
    assert subject.cancel() == [CancelPrefill(), CancelDecode()]
    subject = machine()
    subject.prefill_delta(FIRST, 1.0)
    subject.prefill_delta(HANDED_OFF, 1.0)
    assert subject.cancel() == [CancelDecode()]


def test_nothing_is_delivered_after_a_cancel() -> None:
    subject = machine()
    subject.cancel()
    for event in EVENTS.values():
        assert event(subject) == []


def test_an_abort_by_the_node_is_a_typed_error() -> None:
    subject = machine(has_prefill=False)
    seen = subject.decode_delta(delta(finish_reason=FinishReason.ABORT), 1.0)
    assert isinstance(endings(seen)[0], NodeLost)


@pytest.mark.parametrize("node", ["prefill", "decode"])
@pytest.mark.parametrize("may_recompute", [False, True])
def test_a_cancel_that_nobody_here_ordered_is_a_lost_decode_node(
    node: str, may_recompute: bool
) -> None:
    subject = machine(may_recompute=may_recompute)
    told = delta(error=Cancelled("The request was cancelled."))
    say = subject.prefill_delta if node == "prefill" else subject.decode_delta
    seen = [*say(told, 1.0), *subject.decode_lost(2.0)]
    (error,) = endings(seen)
    assert isinstance(error, NodeLost)
    assert error.reason == "decode_lost"


def test_a_local_sequence_takes_every_token_from_the_decode_node() -> None:
    subject = machine(has_prefill=False)
    seen = subject.decode_delta(delta(1, started=True, num_cached_tokens=0), 1.0)
    seen += subject.decode_delta(SECOND, 1.0) + subject.decode_delta(LAST, 1.0)
    assert tokens(seen) == [1, 2, 3]
    assert subject.prefill_lost(2.0) == []


def test_a_deadline_ends_the_sequence_on_both_nodes() -> None:
    subject = machine(deadline=5.0)
    assert subject.tick(4.9) == []
    seen = subject.tick(5.0)
    assert isinstance(endings(seen)[0], DeadlineExceeded)
    assert seen[1:] == [CancelPrefill(), CancelDecode()]


@pytest.mark.parametrize(("token_seen", "limit"), [(False, 10.0), (True, 3.0)])
def test_silence_ends_the_sequence(token_seen: bool, limit: float) -> None:
    subject = machine(patience=Patience(first_token=10.0, between_tokens=3.0))
    if token_seen:
        subject.prefill_delta(FIRST, 0.0)
    assert subject.tick(limit - 0.1) == []
    assert isinstance(endings(subject.tick(limit))[0], DeadlineExceeded)


# ---- a hand-off that failed and is recomputed ---------------------------------------------

RECOMPUTED = delta(started=True, recomputed=True)
D_FIRST = delta(1, num_cached_tokens=0)


def run_recompute(order: tuple[str, ...], events: dict[str, Event]) -> list[Instruction]:
    one = machine(may_recompute=True)
    return [instruction for name in order for instruction in events[name](one)]


@pytest.mark.parametrize(
    "order",
    interleavings(
        ["P first", "P error", "P lost"], ["D recomputed", "D first", "D second", "D last"]
    )
    + interleavings(["P error"], ["D recomputed", "D first", "D second", "D last"])
    + interleavings(["P lost"], ["D recomputed", "D first", "D second", "D last"]),
)
def test_a_recomputed_sequence_gives_every_token_once(order: tuple[str, ...]) -> None:
    events = {
        **EVENTS,
        "D recomputed": lambda m: m.decode_delta(RECOMPUTED, 1.0),
        "D first": lambda m: m.decode_delta(D_FIRST, 1.0),
    }
    instructions = run_recompute(order, events)
    assert tokens(instructions) == [1, 2, 3]
    assert endings(instructions) == [FinishReason.LENGTH]


def test_a_recomputed_first_token_that_differs_is_never_passed_on() -> None:
    one = machine(may_recompute=True)
    said = one.prefill_delta(FIRST, 1.0) + one.decode_delta(RECOMPUTED, 1.0)
    said += one.decode_delta(delta(9), 2.0)
    assert tokens(said) == [1]
    (error,) = endings(said)
    assert isinstance(error, ServingError)
    assert (error.reason, is_worth_a_retry(error)) == ("recompute_differs", True)


@pytest.mark.parametrize("event", ["P error", "P lost"])
def test_a_failure_of_the_prefill_node_is_the_decode_nodes_to_judge(event: str) -> None:
    one = machine(may_recompute=True)
    assert EVENTS[event](one) == [AskDecode()]
    said = one.decode_delta(delta(error=NodeLost("no", reason="prefill_lost")), 1.0)
    expected = TransferFailed if event == "P error" else NodeLost
    assert [type(ending) for ending in endings(said)] == [expected]


@pytest.mark.parametrize("order", [*itertools.permutations(("P lost", "D started", "D last"))])
def test_a_first_token_lost_with_its_node_is_waited_for_no_longer_when_decode_runs_the_rest(
    order: tuple[str, ...],
) -> None:
    """It was committed: the decode node has all tokens but that one, and recomputes nothing."""
    one = machine(may_recompute=True)
    said = [instruction for name in order for instruction in EVENTS[name](one)]
    (error,) = endings(said)
    assert isinstance(error, NodeLost)
    assert error.reason == "prefill_lost"
    assert CancelDecode() in said


def test_an_error_of_a_decode_node_that_runs_the_sequence_is_its_own() -> None:
    one = machine(may_recompute=True)
    for name in ("P first", "P error", "D started"):
        EVENTS[name](one)
    (error,) = endings(one.decode_delta(delta(error=InternalError("step")), 2.0))
    assert isinstance(error, InternalError)


def test_a_decode_node_that_does_not_answer_is_not_waited_for_long() -> None:
    one = machine(may_recompute=True)
    one.prefill_lost(1.0)
    assert not one.tick(1.0 + ORPHAN_SECONDS * 0.9)
    assert [type(ending) for ending in endings(one.tick(1.0 + ORPHAN_SECONDS))] == [NodeLost]
