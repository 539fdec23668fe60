"""Who has said that it goes is missed in order, whatever else comes before or after."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from cluster.errors import NodeLost, NodeUnavailable, ServingError, TransferFailed
from cluster.node import NodeId, NodeInfo, NodeRole, NodeState
from gateway.departure import Departure, Presence
from gateway.retries import (
    RetryBudget,
    RetryKind,
    is_in_order,
    who_failed,
)
from gateway.router import Placement
from tests.gateway.test_retries import DECODE, LOST, PAIR, PREFILL, node, stream, tokens

Event = Callable[[Departure], None]
EVENTS: dict[str, Event] = {
    "opened": Departure.opened,
    "ready": lambda d: d.told(NodeState.READY),
    "cordoned": lambda d: d.told(NodeState.CORDONED),
    "draining": lambda d: d.told(NodeState.DRAINING),
    "drained": lambda d: d.told(NodeState.DRAINED),
    "ended": lambda d: d.ended(in_order=True),
    "broke": lambda d: d.ended(in_order=False),
}


def after(*names: str) -> Departure:
    departure = Departure()
    for name in names:
        EVENTS[name](departure)
    return departure


def expected(names: tuple[str, ...]) -> Presence:
    """The last event that says anything: a word of the node, an end in order, a return from it."""
    presence = Presence.STAYS
    for name in names:
        if name in ("draining", "drained"):
            presence = Presence.LEAVING
        elif name in ("ready", "cordoned"):
            presence = Presence.STAYS
        elif name == "ended":
            presence = Presence.LEFT
        elif name == "opened" and presence is Presence.LEFT:
            presence = Presence.STAYS
    return presence


def test_every_order_of_events_ends_as_the_last_word_says() -> None:
    num_orders = 0
    for length in range(6):
        for names in itertools.product(EVENTS, repeat=length):
            departure = after(*names)
            assert departure.presence is expected(names), names
            assert departure.is_in_order == (departure.presence is not Presence.STAYS), names
            num_orders += 1
    assert num_orders > 10_000


@pytest.mark.parametrize(
    ("story", "in_order"),
    [
        (("opened", "broke"), False),  # killed
        (("opened", "ended"), True),  # an older node, which says nothing before
        (("opened", "draining", "broke"), True),  # killed in its drain
        (("opened", "draining", "draining", "broke"), True),  # told twice
        (("opened", "draining", "broke", "opened"), True),  # back, and has not said it again yet
        (("opened", "draining", "broke", "opened", "ready", "broke"), False),  # undone meanwhile
        (("opened", "draining", "ready", "broke"), False),  # an uncordon, then killed
        (("opened", "cordoned", "broke"), False),  # held back by an operator, and killed
        (("opened", "ended", "opened", "broke"), False),  # back after it had left, then killed
    ],
)
def test_what_counts_as_in_order(story: tuple[str, ...], in_order: bool) -> None:
    assert after(*story).is_in_order == in_order


def test_what_an_earlier_incarnation_said_is_not_about_the_next() -> None:
    earlier, later = after("opened", "draining"), after("opened")
    assert (earlier.is_in_order, later.is_in_order) == (True, False)


# ---- what it means for a sequence -----------------------------------------------------------


def empty_budget() -> RetryBudget:
    budget = RetryBudget()
    while budget.withdraw():
        pass
    return budget


def failed(reason: str | None, placement: Placement, *leaving: NodeInfo) -> tuple[NodeId, bool]:
    """Who is blamed, and whether it is in order."""
    error: ServingError = NodeLost("x", reason=reason)
    gone = {info.id for info in leaving}
    blamed = who_failed(error, placement, gone)
    return blamed, is_in_order(error, blamed, gone)


@pytest.mark.parametrize(
    ("reason", "leaving", "blamed", "in_order"),
    [
        ("prefill_lost", (PREFILL,), PREFILL, True),
        ("prefill_lost", (DECODE,), PREFILL, False),  # that one was in no drain
        ("decode_lost", (DECODE,), DECODE, True),
        ("decode_lost", (PREFILL,), DECODE, False),
        ("commit_unknown", (DECODE,), DECODE, True),
        ("link_lost", (), PREFILL, False),
        ("link_lost", (PREFILL,), PREFILL, True),
        ("link_lost", (DECODE,), DECODE, True),  # a link has two ends
        ("link_lost", (PREFILL, DECODE), PREFILL, True),
        (None, (DECODE,), DECODE, True),
        ("digest_mismatch", (DECODE,), PREFILL, False),  # wrong KV is no way to leave
    ],
)
def test_a_loss_is_in_order_if_the_node_that_is_missed_goes(
    reason: str | None, leaving: tuple[NodeInfo, ...], blamed: NodeInfo, in_order: bool
) -> None:
    """Whoever reports it: the node's own session, or a peer that misses it first."""
    assert failed(reason, PAIR, *leaving) == (blamed.id, in_order)


def test_a_prompt_that_is_computed_where_it_decodes_has_one_node_to_blame() -> None:
    alone = Placement(prefill=None, decode=DECODE)
    assert failed("not_ready", alone) == (DECODE.id, True)
    assert failed("prefill_lost", alone, DECODE) == (DECODE.id, True)


@pytest.mark.parametrize("reason", ["not_ready", "decode_not_ready"])
def test_a_refusal_is_in_order_before_the_notice_too(reason: str) -> None:
    """It has said so in order: nobody was at work on it, and nothing is in trouble."""
    refused = NodeUnavailable("draining", reason=reason)
    assert is_in_order(refused, who_failed(refused, PAIR, set()), set())


def test_who_meets_one_leaving_node_after_the_other_is_moved_on_each_time() -> None:
    one, budget = stream(), empty_budget()
    for number in range(5):
        kind = one.retry_kind(LOST, budget, is_in_order=True)
        assert kind is RetryKind.IN_ORDER
        leaver = node(f"p{number}", NodeRole.PREFILL)
        one.next_attempt(kind, leaver.id, Placement(prefill=leaver, decode=DECODE), now=0.0)
        assert leaver.id in one.suspects, "no node is tried twice, so this has an end"


def test_moving_on_leaves_the_stream_its_redispatch() -> None:
    one = stream()
    one.next_attempt(RetryKind.IN_ORDER, PREFILL.id, PAIR, now=0.0)
    assert one.retry_kind(LOST, RetryBudget()) is RetryKind.REDISPATCH
    assert one.retry_kind(LOST, empty_budget()) is None


def test_in_order_or_not_a_stream_with_tokens_needs_the_operators_leave_to_go_on() -> None:
    for recovers, kind in ((False, None), (True, RetryKind.RECOVERY)):
        one = stream(recovers=recovers)
        one.deliver(tokens(1))
        assert one.retry_kind(LOST, empty_budget(), is_in_order=True) is kind


def test_what_would_fail_the_same_way_everywhere_is_not_moved_on() -> None:
    assert stream().retry_kind(ServingError("?"), RetryBudget(), is_in_order=True) is None
    spoiled = TransferFailed("x", reason="digest_mismatch")
    assert stream().retry_kind(spoiled, empty_budget()) is None
