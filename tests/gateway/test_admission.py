"""Bounds are kept, room comes back, and those refused are told when to return."""

from __future__ import annotations

import pytest

from cluster.errors import NodeUnavailable, Overloaded
from gateway.admission import Admission, Admitted, Limits

LIMITS = Limits(max_num_reqs=4, max_num_queued_reqs=2, max_num_queued_tokens=100)


def admission(limits: Limits = LIMITS, chance: float = 0.5) -> Admission:
    return Admission(limits, chance=lambda: chance)


def refusal(subject: Admission, num_sequences: int, num_tokens: int) -> Overloaded:
    with pytest.raises(Overloaded) as raised:
        subject.admit(num_sequences, num_tokens)
    return raised.value


def test_sequences_that_queue_are_bounded() -> None:
    subject = admission()
    subject.admit(2, 10)
    assert refusal(subject, 1, 1).reason == "max_num_queued_reqs"


def test_tokens_that_queue_are_bounded() -> None:
    subject = admission()
    subject.admit(1, 90)
    assert refusal(subject, 1, 11).reason == "max_num_queued_tokens"


def test_sequences_in_flight_are_bounded_even_when_none_queues() -> None:
    subject = admission()
    for now in range(4):
        subject.admit(1, 10).prefilled(10, float(now))
    assert refusal(subject, 1, 1).reason == "max_num_reqs"


def test_a_first_token_makes_room_in_the_queue() -> None:
    subject = admission()
    admitted = subject.admit(2, 100)
    admitted.prefilled(60, 1.0)
    assert (subject.num_queued, subject.num_queued_tokens) == (1, 40)
    subject.admit(1, 60)


def test_everything_is_given_back_once() -> None:
    subject = admission()
    admitted = subject.admit(2, 100)
    admitted.prefilled(60, 1.0)
    admitted.release()
    admitted.release()
    admitted.prefilled(40, 2.0)
    assert (subject.num_sequences, subject.num_queued, subject.num_queued_tokens) == (0, 0, 0)


def test_a_request_larger_than_a_bound_is_let_in_when_alone() -> None:
    subject = admission()
    subject.admit(8, 1000)
    assert subject.num_sequences == 8


def test_the_time_to_wait_is_how_long_the_queue_takes_to_drain() -> None:
    subject = admission(Limits(max_num_reqs=9, max_num_queued_reqs=9, max_num_queued_tokens=500))
    admitted = subject.admit(3, 500)
    for now in (0.0, 10.0):
        admitted.prefilled(100, now)
    assert subject.retry_after_seconds() == pytest.approx(30.0)


def many_queue() -> tuple[Admission, Admitted]:
    limits = Limits(max_num_reqs=999, max_num_queued_reqs=99, max_num_queued_tokens=5000)
    subject = admission(limits)
    return subject, subject.admit(50, 5000)


def test_prompts_that_leave_the_queue_together_are_all_counted() -> None:
    """As when they were computed in one step."""
    subject, admitted = many_queue()
    for now in (0.0, 1.0, 2.0):
        for _ in range(10):
            admitted.prefilled(100, now)
    assert subject.retry_after_seconds() == pytest.approx(2.0)


def test_the_time_to_wait_is_known_after_a_moment_of_work() -> None:
    subject, admitted = many_queue()
    for now in (0.0, 0.1, 0.2):
        admitted.prefilled(100, now)
    assert subject.retry_after_seconds() == pytest.approx(4.7)


def test_time_in_which_nothing_queued_says_nothing_of_the_pace() -> None:
    subject, admitted = many_queue()
    for now in range(50):
        admitted.prefilled(100, 0.1 * now)
    admitted = subject.admit(50, 5000)
    admitted.prefilled(100, 3600.0)
    assert subject.retry_after_seconds() == pytest.approx(4.9)


@pytest.mark.parametrize(("chance", "low", "high"), [(0.0, 1.0, 1.0), (0.999, 1.2, 1.25)])
def test_the_time_to_wait_is_spread_and_bounded(chance: float, low: float, high: float) -> None:
    assert low <= admission(chance=chance).retry_after_seconds() <= high


def test_a_closed_door_says_so() -> None:
    subject = admission()
    subject.close()
    with pytest.raises(NodeUnavailable) as raised:
        subject.admit(1, 1)
    assert raised.value.reason == "shutting_down"
