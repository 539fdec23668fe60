from __future__ import annotations

import itertools

import pytest

from gateway.pulse import IDLE_TICKS, LATE_FACTOR, MAX_FACTOR, MIN_UNANSWERED, TICK_SECONDS, Pulse

TIMEOUT = 1.25
NUM_LATE = 3  # ticks until an answer comes


class Peer:
    """One that is pinged, and a clock. Notes, apart from the pulse, what was asked and answered."""

    def __init__(self, timeout: float = TIMEOUT) -> None:
        self.now = 100.0
        self.pulse = Pulse(timeout=timeout)
        self.pulse.opened(self.now)
        self.unanswered: list[int] = []
        self.awake = 0.0  # since the oldest of them was sent, but for what was slept through

    def tick(self, seconds: float = TICK_SECONDS, *, is_urgent: bool = True) -> None:
        self.now += seconds
        self.awake += min(seconds, TICK_SECONDS) if self.unanswered else 0.0
        number = self.pulse.tick(self.now, is_urgent=is_urgent)
        if number is not None:
            self.unanswered.append(number)

    def answer(self, *, after: float = 0.0, last: bool = False) -> None:
        self.now += after
        if self.unanswered:
            number = self.unanswered[-1 if last else 0]
            self.unanswered = [each for each in self.unanswered if each > number]
            self.awake = self.awake if self.unanswered else 0.0
            self.pulse.answered(number, self.now)

    def open(self) -> None:
        self.unanswered, self.awake = [], 0.0
        self.pulse.opened(self.now)

    def seconds_until_silent(self, **how: bool) -> float:
        began = self.now
        while not self.pulse.is_silent:
            self.tick(**how)
            assert self.now - began < 60.0, "never"
        return self.now - began


def answering(num: int, *, late: float, timeout: float = TIMEOUT) -> Peer:
    """A peer that has answered so many pings, each that late."""
    peer = Peer(timeout)
    for _ in range(num):
        peer.tick(TICK_SECONDS - late)
        peer.answer(after=late)
    return peer


def test_a_peer_that_stops_is_silent_soon_after_the_timeout() -> None:
    peer = answering(20, late=0.001)
    assert TIMEOUT <= peer.seconds_until_silent() <= TIMEOUT + 2 * TICK_SECONDS


def test_a_peer_that_answers_late_is_never_silent_and_gets_more_time() -> None:
    peer = Peer()
    for _ in range(NUM_LATE):
        peer.tick()
    for _ in range(40):
        peer.tick()
        peer.answer()
        assert not peer.pulse.is_silent
    assert peer.pulse.patience == pytest.approx(LATE_FACTOR * NUM_LATE * TICK_SECONDS)
    assert peer.seconds_until_silent() > TIMEOUT + TICK_SECONDS


def test_lateness_is_forgotten_slowly() -> None:
    peer = Peer()
    for _ in range(4):
        peer.tick()
    peer.answer()
    patience = peer.pulse.patience
    assert patience > TIMEOUT
    for _ in range(10):
        peer.tick()
        peer.answer(last=True)
    assert TIMEOUT < peer.pulse.patience < patience
    for _ in range(200):
        peer.tick()
        peer.answer(last=True)
    assert peer.pulse.patience == TIMEOUT


def test_after_an_alarm_there_is_twice_the_patience_but_never_without_end() -> None:
    peer = Peer()
    patiences = []
    for _ in range(3):
        peer.seconds_until_silent()
        patiences.append(peer.pulse.patience)
        peer.open()
        assert not peer.pulse.is_silent
    assert patiences == [2 * TIMEOUT, MAX_FACTOR * TIMEOUT, MAX_FACTOR * TIMEOUT]


def test_a_pinger_that_was_stopped_blames_nobody() -> None:
    peer = answering(20, late=0.001)
    for _ in range(MIN_UNANSWERED):
        peer.tick()  # sent right before we were stopped, answered meanwhile, not read yet
    peer.tick(60.0)
    assert not peer.pulse.is_silent
    peer.answer(last=True)
    assert peer.pulse.patience <= 2 * TIMEOUT, "a sleep of ours is not the peer's lateness"
    for _ in range(10):
        peer.tick()
        peer.answer()
        assert not peer.pulse.is_silent


def test_an_idle_peer_is_pinged_seldom_and_at_once_when_somebody_waits() -> None:
    peer = Peer()
    for num_ticks in range(2 * IDLE_TICKS):
        peer.tick(is_urgent=False)
        assert len(peer.unanswered) == 1 + num_ticks // IDLE_TICKS
    peer.tick(is_urgent=True)
    assert len(peer.unanswered) == 3


def test_a_few_lost_pings_are_not_enough_however_long_ago() -> None:
    peer = Peer(timeout=0.01)
    for _ in range(MIN_UNANSWERED - 1):
        peer.tick()
    for _ in range(IDLE_TICKS - 1):
        peer.tick(0.5, is_urgent=False)
    assert not peer.pulse.is_silent


def test_what_was_sent_on_another_connection_counts_for_nothing() -> None:
    peer = Peer()
    for _ in range(MIN_UNANSWERED):
        peer.tick()
    peer.open()
    assert peer.seconds_until_silent() >= TIMEOUT


def test_an_answer_that_nobody_asked_for_changes_nothing() -> None:
    peer = Peer()
    peer.pulse.answered(77, peer.now + 50)
    assert peer.pulse.patience == TIMEOUT


STEPS = {
    "tick": lambda peer: peer.tick(),
    "late tick": lambda peer: peer.tick(3 * TICK_SECONDS),
    "idle tick": lambda peer: peer.tick(is_urgent=False),
    "sleep": lambda peer: peer.tick(30.0),
    "answer": lambda peer: peer.answer(after=0.1),
    "answer to all": lambda peer: peer.answer(last=True),
    "open": lambda peer: peer.open(),
}


@pytest.mark.parametrize("first", STEPS)
def test_in_every_order_only_a_peer_that_left_enough_pings_unanswered_is_silent(first: str) -> None:
    for rest in itertools.product(STEPS, repeat=5):
        peer = Peer(timeout=3 * TICK_SECONDS)
        for _ in range(MIN_UNANSWERED - 1):
            peer.tick()
        for name in (first, *rest):
            was_patient = peer.pulse.patience
            was_silent = peer.pulse.is_silent
            STEPS[name](peer)
            assert 3 * TICK_SECONDS <= peer.pulse.patience <= 9 * TICK_SECONDS
            if peer.pulse.is_silent and not was_silent:
                assert len(peer.unanswered) >= MIN_UNANSWERED, (first, *rest)
                assert peer.awake >= was_patient - 1e-6, (first, *rest)
