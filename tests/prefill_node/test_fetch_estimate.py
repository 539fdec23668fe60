"""When fetching a prefix is believed to be quicker than computing it."""

from __future__ import annotations

import pytest

from cluster.node import Incarnation, NodeId, NodeName
from prefill_node.fetch_estimate import (
    AVOID_SECONDS,
    FIXED_SECONDS,
    LATENCY_SECONDS,
    MAX_WAYS,
    MIN_LIMIT_SECONDS,
    REMEMBER_SECONDS,
    FetchEstimate,
    Lacking,
)

HOLDER = NodeId(NodeName("d0"), Incarnation(1))
OTHER = NodeId(NodeName("d1"), Incarnation(1))


def measured(computed: int, moved: int) -> FetchEstimate:
    """By tokens a second."""
    estimate = FetchEstimate()
    estimate.computed(computed, 1, 1.0)
    estimate.reached(HOLDER)
    estimate.fetched(HOLDER, moved, 1.0 + LATENCY_SECONDS, now=0.0)
    return estimate


def lacking(num_tokens: int) -> Lacking:
    """On all of our tiers."""
    return Lacking(num_tokens, num_tokens)


def test_it_pays_where_the_link_is_faster_than_the_engine() -> None:
    estimate = measured(computed=1000, moved=100_000)
    assert estimate.pays(HOLDER, lacking(1000), now=0.0)


def test_it_does_not_pay_over_a_slow_link_nor_for_a_few_tokens() -> None:
    assert not measured(1000, 500).pays(HOLDER, lacking(1000), now=0.0)
    assert not measured(1000, 100_000).pays(HOLDER, lacking(2), now=0.0)
    assert not measured(1000, 100_000).pays(HOLDER, lacking(0), now=0.0)


def test_a_holder_that_failed_is_avoided_for_a_while_and_others_are_not() -> None:
    estimate = measured(1000, 100_000)
    estimate.failed(HOLDER, now=5.0)
    assert not estimate.pays(HOLDER, lacking(1000), now=5.0)
    assert estimate.is_avoided(HOLDER, now=5.0 + AVOID_SECONDS - 0.1)
    assert not estimate.is_avoided(OTHER, now=5.0)
    assert not estimate.is_avoided(HOLDER, now=5.0 + AVOID_SECONDS)


def test_later_measurements_weigh_more_than_early_ones() -> None:
    estimate = measured(1000, 100_000)
    for _ in range(20):
        estimate.computed(100_000, 1, 1.0)
    assert 0.9 < estimate.compute_seconds(100_000) < 1.1


def test_a_fetch_is_given_up_when_computing_would_have_been_done_twice() -> None:
    estimate = measured(1000, 100_000)
    assert estimate.limit_seconds(4000) == 8.0
    assert estimate.limit_seconds(1) == MIN_LIMIT_SECONDS
    estimate.computed(0, 1, 1.0)
    estimate.fetched(HOLDER, 0, 0.0, now=0.0)
    assert estimate.limit_seconds(4000) == 8.0, "nothing was measured"


def test_what_was_not_measured_lately_counts_no_more_but_the_way_stays_known() -> None:
    """Where a prompt comes every few minutes, too, it is fetched."""
    slow = measured(1000, 500)
    assert not slow.pays(HOLDER, lacking(1000), now=REMEMBER_SECONDS - 1)
    assert slow.pays(HOLDER, lacking(1000), now=REMEMBER_SECONDS)
    slow.fetched(HOLDER, 100, 60.0, now=REMEMBER_SECONDS)
    assert not slow.pays(HOLDER, lacking(1000), now=REMEMBER_SECONDS)
    assert not slow.pays(OTHER, lacking(1000), now=0.0), "each holder has its own"


def test_behind_a_failure_nobody_waits_for_the_first_contact_and_a_rate_is_remembered() -> None:
    estimate = measured(1000, 500)
    estimate.failed(HOLDER, now=1.0)
    assert not estimate.is_known(HOLDER)
    estimate.reached(HOLDER)
    assert estimate.is_known(HOLDER)
    assert not estimate.pays(HOLDER, lacking(1000), now=2.0 + AVOID_SECONDS)


def test_ways_from_nodes_that_came_and_went_do_not_gather() -> None:
    estimate = measured(1000, 500)
    nodes = [NodeId(NodeName(f"d{index}"), Incarnation(1)) for index in range(MAX_WAYS + 1)]
    for node in nodes:
        estimate.reached(node)
    assert not estimate.is_known(HOLDER)
    assert estimate.is_known(nodes[1])


def test_what_we_have_in_host_memory_is_moved_again_and_saves_nothing() -> None:
    estimate = measured(computed=1000, moved=10_000)
    assert estimate.pays(HOLDER, Lacking(500, 1000), now=0.0)
    assert not estimate.pays(HOLDER, Lacking(100, 1000), now=0.0)
    assert not estimate.pays(HOLDER, Lacking(0, 1000), now=0.0)


def test_the_holder_may_restore_for_as_long_as_computing_is_slower_than_moving() -> None:
    estimate = measured(computed=1000, moved=2000)
    seconds = estimate.restore_seconds_per_token(HOLDER, lacking(1000), now=0.0)
    assert seconds == pytest.approx((1.0 - 0.5 - FIXED_SECONDS) / 1000)
    slow = measured(computed=1000, moved=500)
    assert slow.restore_seconds_per_token(HOLDER, lacking(1000), now=0.0) == 0.0
    partly = estimate.restore_seconds_per_token(HOLDER, Lacking(800, 1000), now=0.0)
    assert partly == pytest.approx((0.8 - 0.5 - FIXED_SECONDS) / 1000)


def test_on_a_way_that_nobody_measured_the_holder_may_take_the_time_of_computing() -> None:
    estimate = measured(computed=1000, moved=2000)
    seconds = estimate.restore_seconds_per_token(OTHER, lacking(100), now=0.0)
    assert seconds == pytest.approx((0.1 - FIXED_SECONDS) / 100)


def test_once_reached_a_way_is_believed_to_be_fast_until_a_prompt_has_waited() -> None:
    estimate = FetchEstimate()
    assert not estimate.pays(HOLDER, lacking(1000), now=0.0)
    estimate.reached(HOLDER)
    assert estimate.is_known(HOLDER)
    assert estimate.pays(HOLDER, lacking(1000), now=0.0)
    assert not estimate.pays(HOLDER, lacking(1), now=0.0), "calls take longer than one token"
    estimate.fetched(HOLDER, 1000, 60.0, now=1.0)
    assert not estimate.pays(HOLDER, lacking(1000), now=1.0)
    estimate.reached(HOLDER)
    assert not estimate.pays(HOLDER, lacking(1000), now=2.0), "what was measured stays"


def test_steps_of_few_tokens_say_nothing_of_the_engine() -> None:
    estimate = measured(10_000, 100_000)
    for _ in range(50):
        estimate.computed(16 * 3, 3, 0.09)
    assert estimate.compute_seconds(10_000) == pytest.approx(1.0)


def test_small_fetches_say_little_of_a_way() -> None:
    estimate = measured(computed=10_000, moved=100_000)
    for _ in range(5):
        estimate.fetched(HOLDER, 16, LATENCY_SECONDS + 0.001, now=0.0)
    assert estimate.pays(HOLDER, lacking(10_000), now=0.0)
    for _ in range(5):
        estimate.fetched(HOLDER, 16, LATENCY_SECONDS / 2, now=0.0)
    assert estimate.pays(HOLDER, lacking(10_000), now=0.0)
