"""A pair between which hand-offs fail is held back for a while, and never for ever."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cluster.node import Incarnation, NodeId, NodeName
from gateway.pair_breaker import (
    FAILURES_IN_A_ROW,
    FIRST_PAUSE_SECONDS,
    MAX_PAUSE_SECONDS,
    OpenPair,
    Pair,
    PairBreaker,
)


def node(name: str, incarnation: int = 1) -> NodeId:
    return NodeId(NodeName(name), Incarnation(incarnation))


PAIR: Pair = (node("p0"), node("d0"))
OTHER: Pair = (node("p0"), node("d1"))
REASON = "link_lost"


def opened(now: float = 0.0) -> PairBreaker:
    breaker = PairBreaker()
    for number in range(FAILURES_IN_A_ROW):
        breaker.failed(PAIR, f"first-{number}", REASON, now)
    return breaker


def test_only_failures_in_a_row_hold_a_pair_back() -> None:
    breaker = PairBreaker()
    for number in range(FAILURES_IN_A_ROW - 1):
        assert breaker.failed(PAIR, f"a{number}", REASON, 0.0) is None
    assert not breaker.succeeded(PAIR)
    for number in range(FAILURES_IN_A_ROW - 1):
        assert breaker.failed(PAIR, f"b{number}", REASON, 0.0) is None
    assert not breaker.held_back(0.0)
    assert breaker.failed(PAIR, "c", REASON, 0.0) == FIRST_PAUSE_SECONDS
    assert breaker.held_back(0.0) == {PAIR}
    assert breaker.open_pairs(0.5) == [OpenPair(PAIR, REASON, FIRST_PAUSE_SECONDS - 0.5)]


def test_failures_of_one_pair_are_held_against_no_other_of_its_nodes() -> None:
    breaker = PairBreaker()
    for number in range(FAILURES_IN_A_ROW - 1):
        for pair in (PAIR, OTHER):
            assert breaker.failed(pair, f"{number}", REASON, 0.0) is None
    breaker.failed(PAIR, "last", REASON, 0.0)
    assert breaker.held_back(0.0) == {PAIR}


def test_after_the_pause_one_sequence_is_tried_and_its_success_ends_the_hold() -> None:
    breaker = opened()
    assert breaker.held_back(FIRST_PAUSE_SECONDS - 0.1) == {PAIR}
    assert not breaker.held_back(FIRST_PAUSE_SECONDS)
    breaker.begun(PAIR, "probe", FIRST_PAUSE_SECONDS)
    assert breaker.held_back(FIRST_PAUSE_SECONDS) == {PAIR}
    assert breaker.held_back(1000.0) == {PAIR}, "its end is awaited, however long it takes"
    assert breaker.succeeded(PAIR)
    assert not breaker.held_back(1000.0)
    assert not breaker.open_pairs(1000.0)


def test_each_probe_that_fails_doubles_the_pause_up_to_a_minute() -> None:
    breaker, now, pauses = opened(), 0.0, [FIRST_PAUSE_SECONDS]
    for number in range(7):
        now += pauses[-1]
        breaker.begun(PAIR, f"probe-{number}", now)
        pause = breaker.failed(PAIR, f"probe-{number}", "digest_mismatch", now)
        assert pause is not None
        pauses.append(pause)
    assert pauses == [2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]
    assert breaker.open_pairs(now) == [OpenPair(PAIR, "digest_mismatch", MAX_PAUSE_SECONDS)]
    breaker.succeeded(PAIR)
    for number in range(FAILURES_IN_A_ROW):
        pause = breaker.failed(PAIR, f"again-{number}", REASON, now)
    assert pause == FIRST_PAUSE_SECONDS, "what was before its success is forgotten"


def test_a_probe_that_ends_without_a_verdict_gives_its_turn_to_the_next() -> None:
    breaker = opened()
    breaker.begun(PAIR, "probe", 5.0)
    breaker.released(PAIR, "another")
    assert breaker.held_back(5.0) == {PAIR}
    breaker.released(PAIR, "probe")
    assert not breaker.held_back(5.0)
    breaker.begun(PAIR, "next", 5.0)
    assert breaker.failed(PAIR, "next", REASON, 5.0) == 2 * FIRST_PAUSE_SECONDS


def test_what_others_fail_while_a_pair_is_held_back_makes_the_pause_no_longer() -> None:
    breaker = opened()
    breaker.begun(PAIR, "for want of another", 1.0)
    assert breaker.failed(PAIR, "for want of another", REASON, 1.0) is None
    breaker.begun(PAIR, "probe", 2.0)
    assert breaker.failed(PAIR, "from before", REASON, 3.0) is None
    assert breaker.open_pairs(3.0) == [OpenPair(PAIR, REASON, 0.0)]


def test_a_success_of_whatever_went_there_ends_the_hold_and_the_probe_with_it() -> None:
    breaker = opened()
    breaker.begun(PAIR, "probe", 2.0)
    assert breaker.succeeded(PAIR)
    assert breaker.failed(PAIR, "probe", REASON, 3.0) is None
    assert not breaker.held_back(3.0)


def test_pairs_of_nodes_that_are_gone_are_forgotten() -> None:
    breaker = opened()
    breaker.failed(OTHER, "a", REASON, 0.0)
    breaker.keep({*PAIR, node("d1", 2)})
    assert breaker.held_back(0.0) == {PAIR}
    breaker.keep({PAIR[0], node("d0", 2)})
    assert breaker.num_open == 0
    assert not breaker._records


# ---- every order ------------------------------------------------------------------------------


class PairHistory(RuleBasedStateMachine):
    """Sequences begin and end on one pair in any order, at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.breaker = PairBreaker()
        self.now = 0.0
        self.running: list[str] = []
        self.probe: str | None = None
        self.num_begun = 0
        self.num_failed = 0  # since the last success
        self.pause = 0.0
        self.opened_at = 0.0

    @property
    def is_held_back(self) -> bool:
        return PAIR in self.breaker.held_back(self.now)

    @rule(seconds=st.sampled_from([0.1, 1.0, 5.0, 61.0]))
    def passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def begins(self) -> None:
        self.num_begun += 1
        attempt_id = f"s{self.num_begun}"
        if self.pause and not self.is_held_back:
            assert self.probe is None, "two are tried at once"
            self.probe = attempt_id
        self.breaker.begun(PAIR, attempt_id, self.now)
        self.running.append(attempt_id)

    @rule(data=st.data(), outcome=st.sampled_from(["succeeded", "failed", "released"]))
    def ends(self, data: st.DataObject, outcome: str) -> None:
        if not self.running:
            return
        attempt_id = data.draw(st.sampled_from(self.running))
        self.running.remove(attempt_id)
        is_probe = attempt_id == self.probe
        if outcome == "succeeded":
            assert self.breaker.succeeded(PAIR) == (self.pause > 0)
            self.probe, self.num_failed, self.pause = None, 0, 0.0
        elif outcome == "failed":
            self._fails(attempt_id, is_probe)
        else:
            self.breaker.released(PAIR, attempt_id)
        if is_probe:
            self.probe = None

    def _fails(self, attempt_id: str, is_probe: bool) -> None:
        self.num_failed += 1
        pause = self.breaker.failed(PAIR, attempt_id, REASON, self.now)
        opens = is_probe or (not self.pause and self.num_failed >= FAILURES_IN_A_ROW)
        assert (pause is not None) == opens
        if pause is not None:
            assert pause == min(MAX_PAUSE_SECONDS, max(FIRST_PAUSE_SECONDS, 2 * self.pause))
            self.pause, self.opened_at = pause, self.now

    @invariant()
    def is_held_back_for_a_pause_and_during_a_probe_alone(self) -> None:
        is_pausing = self.pause > 0 and self.now < self.opened_at + self.pause
        assert self.is_held_back == (is_pausing or self.probe is not None)
        assert self.breaker.num_open == (self.pause > 0)

    @invariant()
    def is_free_again_in_a_minute_if_nobody_is_tried(self) -> None:
        if self.probe is None:
            assert not self.breaker.held_back(self.now + MAX_PAUSE_SECONDS)


TestPairHistory = PairHistory.TestCase
TestPairHistory.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
