"""Who waits, in order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from engine.waiting_queue import WaitingQueue, order_key
from tests.sequences import make_sequence

if TYPE_CHECKING:
    from engine.sequence import Sequence


def waiting(*priorities: int) -> list[Sequence]:
    sequences = [make_sequence([1], priority=priority) for priority in priorities]
    for arrival, sequence in enumerate(sequences):
        sequence.arrival = arrival
    return sequences


def drain(queue: WaitingQueue) -> list[Sequence]:
    drained = []
    while (sequence := queue.peek()) is not None:
        queue.remove(sequence)
        drained.append(sequence)
    return drained


def test_urgent_ones_come_first_then_the_oldest() -> None:
    low, first, second, urgent = waiting(5, 0, 0, -1)
    queue = WaitingQueue()
    for sequence in (second, low, urgent, first):
        queue.push(sequence)
    assert drain(queue) == [urgent, first, second, low]


def test_one_that_left_and_came_back_is_there_once() -> None:
    (sequence,) = waiting(0)
    queue = WaitingQueue()
    queue.push(sequence)
    queue.remove(sequence)
    assert queue.peek() is None
    queue.push(sequence)
    assert len(queue) == 1
    assert drain(queue) == [sequence]


def test_those_who_left_behind_a_blocked_head_are_not_kept() -> None:
    head, *others = waiting(*([0] * 1000))
    queue = WaitingQueue()
    queue.push(head)
    for sequence in others:
        queue.push(sequence)
        queue.remove(sequence)
    assert len(queue._heap) < 100
    assert drain(queue) == [head]


@given(st.lists(st.tuples(st.integers(-2, 2), st.booleans()), max_size=200))
def test_any_mix_of_leaving_keeps_the_order(plan: list[tuple[int, bool]]) -> None:
    sequences = waiting(*(priority for priority, _ in plan))
    queue = WaitingQueue()
    for sequence in sequences:
        queue.push(sequence)
    staying = []
    for sequence, (_, leaves) in zip(sequences, plan, strict=True):
        if leaves:
            queue.remove(sequence)
        else:
            staying.append(sequence)
    assert set(queue) == set(staying)
    assert drain(queue) == sorted(staying, key=order_key)
