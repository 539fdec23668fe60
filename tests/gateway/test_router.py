"""Placements follow load and cached prefixes, among nodes that may exchange KV."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import NodeUnavailable
from cluster.node import Incarnation, NodeId, NodeInfo, NodeLoad, NodeName, NodeRole, NodeState
from gateway.router import Candidate, Demand, Placement, choose, choose_again

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gateway.pair_breaker import Pair

DEMAND = Demand(num_prompt_tokens=1000, num_tokens=1500)


def node(name: str, **changes: object) -> NodeInfo:
    fields: dict[str, object] = {
        "id": NodeId(NodeName(name), Incarnation(1)),
        "role": NodeRole.PREFILL if name.startswith("p") else NodeRole.DECODE,
        "state": NodeState.READY,
        "grpc_address": "127.0.0.1:1",
        "metrics_address": "",
        "model_name": "m",
        "compatibility_hash": "h",
        "block_size": 16,
        "max_model_len": 4096,
        "load": NodeLoad(num_blocks=1000, num_free_blocks=1000),
    }
    return NodeInfo(**{**fields, **changes})  # type: ignore[arg-type]


def candidate(
    name: str, *, node_changes: Mapping[str, object] | None = None, **changes: object
) -> Candidate:
    fields: dict[str, object] = {
        "node": node(name, **(node_changes or {})),
        "is_connected": True,
        "queued_tokens": 0,
        "num_sequences": 0,
        "reserved_tokens": 0,
    }
    return Candidate(**{**fields, **changes})  # type: ignore[arg-type]


def names(placement: Placement) -> tuple[str | None, str]:
    prefill = placement.prefill.id.name if placement.prefill else None
    return prefill, placement.decode.id.name


def test_the_shorter_queue_and_the_smaller_batch_win() -> None:
    placement = choose(
        [
            candidate("p1", queued_tokens=5000),
            candidate("p2", queued_tokens=100),
            candidate("d1", num_sequences=3),
            candidate("d2", num_sequences=40),
        ],
        DEMAND,
    )
    assert names(placement) == ("p2", "d1")


def test_a_cached_prefix_wins_until_its_queue_costs_more() -> None:
    others = [candidate("p2"), candidate("d1")]
    warm = candidate("p1", num_cached_tokens=960, queued_tokens=900)
    assert names(choose([warm, *others], DEMAND))[0] == "p1"
    saturated = candidate("p1", num_cached_tokens=960, queued_tokens=1100)
    assert names(choose([saturated, *others], DEMAND))[0] == "p2"


@pytest.mark.parametrize("state", [state for state in NodeState if state is not NodeState.READY])
def test_only_ready_nodes_take_work(state: NodeState) -> None:
    with pytest.raises(NodeUnavailable) as raised:
        choose([candidate("p1", node_changes={"state": state}), candidate("d1")], DEMAND)
    assert raised.value.retry_after_seconds is not None


def test_a_node_that_is_not_connected_takes_no_work() -> None:
    with pytest.raises(NodeUnavailable):
        choose([candidate("p1"), candidate("d1", is_connected=False)], DEMAND)


def test_a_node_that_joined_later_and_is_too_small_takes_no_longer_request() -> None:
    small = {"max_model_len": 1900}
    nodes = [candidate("p1"), candidate("d1", node_changes=small)]
    fits = Demand(num_prompt_tokens=1000, num_tokens=1500, max_num_tokens=1900)
    assert names(choose(nodes, fits)) == ("p1", "d1")
    with pytest.raises(NodeUnavailable):
        choose(nodes, replace(fits, max_num_tokens=1901))


def test_only_nodes_of_equal_compatibility_are_paired() -> None:
    foreign = {"compatibility_hash": "other"}
    with pytest.raises(NodeUnavailable):
        choose([candidate("p1"), candidate("d1", node_changes=foreign)], DEMAND)
    placement = choose(
        [
            candidate("p1", queued_tokens=10**6),
            candidate("d1"),
            candidate("p2", node_changes=foreign),
        ],
        DEMAND,
    )
    assert names(placement) == ("p1", "d1")


def test_a_short_uncached_part_is_prefilled_where_it_decodes() -> None:
    nodes = [candidate("p1"), candidate("d1", num_cached_tokens=900)]
    assert names(choose(nodes, DEMAND, local_prefill_tokens=100)) == (None, "d1")
    assert names(choose(nodes, DEMAND, local_prefill_tokens=99)) == ("p1", "d1")
    assert names(choose(nodes, DEMAND)) == ("p1", "d1")


def test_a_decode_node_whose_memory_would_run_full_is_avoided() -> None:
    full = {"load": NodeLoad(num_blocks=1000, num_free_blocks=60)}
    nodes = [
        candidate("p1"),
        candidate("d1", node_changes=full),
        candidate("d2", num_sequences=100),
    ]
    assert names(choose(nodes, DEMAND))[1] == "d2"


def test_own_debits_count_before_the_next_heartbeat() -> None:
    nodes = [candidate("p1"), candidate("d1", reserved_tokens=15_000), candidate("d2")]
    assert names(choose(nodes, DEMAND))[1] == "d2"


def test_every_candidate_is_kept_with_its_cost() -> None:
    placement = choose([candidate("p1"), candidate("p2"), candidate("d1")], DEMAND)
    assert sorted(cost.name for cost in placement.costs) == ["d1", "p1", "p2"]


def test_whoever_has_most_of_the_prompt_cached_is_named_to_the_prefill_node() -> None:
    def that_fetches(name: str, **changes: object) -> Candidate:
        return candidate(name, node_changes={"fetches_prefixes": True}, **changes)

    nodes = [
        that_fetches("p1", num_cached_tokens=100),
        that_fetches("p2", num_cached_tokens=500, queued_tokens=90_000),
        that_fetches("d1", num_cached_tokens=800),
        candidate("d2", num_cached_tokens=900, num_sequences=900),
    ]
    placement = choose(nodes, DEMAND)
    assert names(placement) == ("p1", "d1")
    assert placement.holder is not None
    assert placement.holder.node.name == "d1"
    assert placement.holder.num_tokens == 800
    assert placement.holder.num_more_tokens == 700
    nodes[0] = that_fetches("p1", num_cached_tokens=800)
    assert choose(nodes, DEMAND).holder is None, "nobody has more"
    nodes[0] = candidate("p1", num_cached_tokens=100)
    assert choose(nodes, DEMAND).holder is None, "it does not fetch"


# ---- pairs that are held back -----------------------------------------------------------------


def held(*pairs: str) -> set[Pair]:
    """As "p1 d1"."""
    names = (pair.split() for pair in pairs)
    return {(node(prefill).id, node(decode).id) for prefill, decode in names}


def cost_of(placement: Placement) -> float:
    costs = {cost.name: cost.cost for cost in placement.costs}
    return sum(costs[str(name)] for name in names(placement))


def test_the_cheapest_pair_that_is_not_held_back_is_taken_and_why_is_kept() -> None:
    nodes = [candidate("p1"), candidate("p2", queued_tokens=100)]
    nodes += [candidate("d1"), candidate("d2", num_sequences=40)]
    placement = choose(nodes, DEMAND, held_back=held("p1 d1"))
    assert names(placement) == ("p2", "d1")
    assert placement.instead_of == "p1 > d1"
    placement = choose(nodes, DEMAND, held_back=held("p1 d2"))
    assert names(placement) == ("p1", "d1")
    assert placement.instead_of is None


def test_a_pair_that_is_held_back_is_taken_where_there_is_no_other() -> None:
    nodes = [candidate("p1"), candidate("p2", queued_tokens=100), candidate("d1")]
    placement = choose(nodes, DEMAND, held_back=held("p1 d1", "p2 d1"))
    assert names(placement) == ("p1", "d1")
    assert placement.instead_of is None
    unlike = candidate("d2", node_changes={"compatibility_hash": "other"})
    assert names(choose([*nodes, unlike], DEMAND, held_back=held("p1 d1", "p2 d1")))[1] == "d1"
    too_small = candidate("d2", node_changes={"max_model_len": 10})
    demand = replace(DEMAND, max_num_tokens=100)
    assert names(choose([*nodes, too_small], demand, held_back=held("p1 d1", "p2 d1")))[1] == "d1"


def test_nodes_of_another_layout_take_over_from_pairs_that_are_held_back() -> None:
    other = {"compatibility_hash": "other"}
    nodes = [candidate("p1"), candidate("d1")]
    nodes += [candidate(n, num_sequences=90, node_changes=other) for n in ("p2", "d2")]
    assert names(choose(nodes, DEMAND, held_back=held("p1 d1"))) == ("p2", "d2")


def test_what_is_prefilled_on_its_decode_node_needs_no_pair() -> None:
    nodes = [candidate("p1"), candidate("p2"), candidate("d1", num_cached_tokens=900)]
    nodes += [candidate("d2")]
    placement = choose(nodes, DEMAND, local_prefill_tokens=100, held_back=held("p1 d1"))
    assert names(placement) == (None, "d1")
    assert placement.instead_of is None


def test_a_second_attempt_takes_a_partner_again_before_a_pair_that_is_held_back() -> None:
    nodes = [candidate(name) for name in ("p1", "p2", "d1", "d2")]
    failed = node("p1").id, node("d1").id
    for held_back, taken in (
        (held(), ("p2", "d2")),
        (held("p2 d2"), ("p2", "d1")),
        (held("p2 d2", "p2 d1"), ("p2", "d2")),
    ):
        placement = choose_again(
            nodes, DEMAND, suspects={failed[0]}, avoided=set(failed), held_back=held_back
        )
        assert names(placement) == taken


ROLES = st.lists(st.integers(0, 3), min_size=1, max_size=4)


@given(queues=ROLES, batches=ROLES, data=st.data())
def test_of_the_pairs_that_are_left_none_is_cheaper(
    queues: list[int], batches: list[int], data: st.DataObject
) -> None:
    prefill = [candidate(f"p{i}", queued_tokens=n * 100) for i, n in enumerate(queues)]
    decode = [candidate(f"d{i}", num_sequences=n) for i, n in enumerate(batches)]
    pairs = [(p.node.id, d.node.id) for p in prefill for d in decode]
    held_back = data.draw(st.sets(st.sampled_from(pairs)))
    placement = choose([*prefill, *decode], DEMAND, held_back=held_back)
    assert placement.prefill is not None
    taken = placement.prefill.id, placement.decode.id
    free = set(pairs) - held_back or set(pairs)
    assert taken in free
    costs = {cost.name: cost.cost for cost in placement.costs}
    assert cost_of(placement) == min(costs[p.name] + costs[d.name] for p, d in free)
    best = choose([*prefill, *decode], DEMAND)
    assert (placement.instead_of is None) == (names(placement) == names(best))
