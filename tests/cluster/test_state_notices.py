"""Who leaves waits for every gateway that hears states, in every order, and for nobody else."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from cluster.state_notices import ANSWER_SECONDS, StateNotices
from tests.interleavings import explore

if TYPE_CHECKING:
    from collections.abc import Callable


def settle(notices: StateNotices, name: str, number: int) -> None:
    notices.answered(name, number, is_settled=True)


def know(notices: StateNotices, name: str, number: int) -> None:
    notices.answered(name, number, is_settled=False)


def told(*names: str) -> tuple[StateNotices, int]:
    """These have sessions, and were told."""
    notices = StateNotices()
    for name in names:
        notices.opened(name, 0.0)
    return notices, notices.told(0.0)


def test_a_notice_is_answered_once_every_session_has_settled() -> None:
    notices, number = told("a", "b")
    assert notices.awaited(0.0) == ["a", "b"]
    settle(notices, "a", number)
    assert not notices.is_answered(0.0)
    assert notices.awaited(0.0) == ["b"]
    settle(notices, "b", number)
    assert notices.is_answered(0.0)


def test_without_gateways_there_is_nobody_to_wait_for() -> None:
    notices = StateNotices()
    assert notices.is_answered(0.0)
    notices.told(0.0)
    assert notices.is_answered(0.0)


def test_a_gateway_that_stands_still_is_not_waited_for_for_ever() -> None:
    notices, _ = told("still")
    notices.told(5.0)
    assert not notices.is_answered(5.0 + ANSWER_SECONDS - 0.1)
    assert notices.is_answered(5.0 + ANSWER_SECONDS)


def test_a_gateway_that_knows_is_waited_for_until_all_has_come() -> None:
    """Prompts that it has placed may wait on a prefill node for long."""
    notices, number = told("g")
    know(notices, "g", number)
    assert not notices.is_answered(100 * ANSWER_SECONDS)
    settle(notices, "g", number)
    assert notices.is_answered(100 * ANSWER_SECONDS)


def test_a_late_answer_to_an_earlier_notice_answers_nothing() -> None:
    notices, first = told("g")
    second = notices.told(0.0)
    settle(notices, "g", first)
    assert not notices.is_answered(0.0)
    settle(notices, "g", second)
    settle(notices, "g", first)
    assert notices.is_answered(0.0)


def test_to_know_is_not_to_have_settled_whatever_was_settled_before() -> None:
    notices, first = told("g")
    settle(notices, "g", first)
    second = notices.told(0.0)
    know(notices, "g", second)
    know(notices, "g", first)
    assert not notices.is_answered(ANSWER_SECONDS)


def test_answers_to_what_was_not_told_say_nothing() -> None:
    notices, number = told("g")
    settle(notices, "g", number + 1)
    settle(notices, "stranger", number)
    assert not notices.is_answered(0.0)
    notices.closed("stranger")
    notices.told(0.0)
    assert not notices.is_answered(0.0), "an answer is not given before its notice"


def test_a_session_that_comes_in_the_drain_has_to_answer_too() -> None:
    notices, number = told("g")
    settle(notices, "g", number)
    notices.closed("g")
    notices.opened("g", 60.0)
    assert not notices.is_answered(60.0), "its time counts from when it was asked"
    settle(notices, "g", number)
    assert notices.is_answered(60.0)


class NoticesWorld:
    """Two gateways come, answer and go, and one comes back, around a drain that is said twice."""

    def __init__(self) -> None:
        self.notices = StateNotices()
        self.settled: dict[str, int] = {}  # of each session that stands
        self.given: dict[str, list[int]] = {"a": [], "b": []}  # notices on the way to each

    def possible(self) -> dict[str, Callable[[], None]]:
        steps: dict[str, Callable[[], None]] = {"drain": self.tell, "again": self.tell}
        for name in ("a", "b"):
            if name not in self.settled:
                steps[f"{name} comes"] = steps[f"{name} returns"] = partial(self.open, name)
                continue
            steps[f"{name} goes"] = partial(self.close, name)
            if self.given[name]:
                steps[f"{name} knows"] = partial(self.know, name)
                steps[f"{name} settles"] = partial(self.settle, name)
                steps[f"{name} settles more"] = partial(self.settle, name)
        return steps

    def tell(self) -> None:
        number = self.notices.told(0.0)
        for name in self.settled:
            self.given[name].append(number)
        self.check()

    def open(self, name: str) -> None:
        self.notices.opened(name, 0.0)
        self.settled[name] = 0
        self.given[name] = [self.notices.number] if self.notices.number else []
        self.check()

    def know(self, name: str) -> None:
        know(self.notices, name, self.given[name][0])
        self.check()

    def settle(self, name: str) -> None:
        self.settled[name] = self.given[name].pop(0)
        settle(self.notices, name, self.settled[name])
        self.check()

    def close(self, name: str) -> None:
        self.notices.closed(name)
        del self.settled[name]
        self.check()

    def check(self) -> None:
        expected = all(number == self.notices.number for number in self.settled.values())
        assert self.notices.is_answered(0.0) == expected

    def finish(self) -> None:
        for name in list(self.settled):
            while self.given[name]:
                self.settle(name)
        assert self.notices.is_answered(0.0)


def test_in_every_order_a_notice_is_answered_exactly_when_all_who_are_there_have_settled() -> None:
    one = ("a comes", "a knows", "a settles", "a settles more", "a goes", "a returns")
    assert explore(NoticesWorld, ("drain", "again", *one)) > 100
    two = ("a comes", "a settles", "b comes", "b knows", "b settles", "b goes")
    assert explore(NoticesWorld, ("drain", "again", *two)) > 100
