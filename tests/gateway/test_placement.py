"""Requests go where the router says: to cached prefixes, to idle nodes, to equal partners."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import httpx

from cluster.membership import ClusterView
from cluster.node import Incarnation, NodeName, NodeRole
from tests.gateway.fake_node import FakeNode

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

    from tests.gateway.running_gateway import RunningGateway

MODEL = "org/test-model"


def ask(running: RunningGateway, num_tokens: int) -> None:
    body = {"model": MODEL, "prompt": [50] * num_tokens, "max_tokens": 2, "ignore_eos": True}
    assert httpx.post(f"{running.url}/v1/completions", json=body).status_code == 200


def counts(running: RunningGateway) -> dict[str, int]:
    return {name: len(node.submitted) for name, node in running.nodes.items()}


def test_a_cached_prefix_draws_a_request(new_gateway: Callable[..., RunningGateway]) -> None:
    running = new_gateway(num_prefill=2, num_decode=2)
    running.index.cached = {NodeName("prefill-1"): 10, NodeName("decode-1"): 10}
    ask(running, 200)
    assert counts(running) == {"prefill-0": 0, "prefill-1": 1, "decode-0": 0, "decode-1": 1}


def test_a_lone_pair_costs_no_lookup(new_gateway: Callable[..., RunningGateway]) -> None:
    running = new_gateway()
    ask(running, 200)
    assert running.index.num_asked == 0


def test_a_short_uncached_part_is_prefilled_on_the_decode_node(
    new_gateway: Callable[..., RunningGateway],
) -> None:
    running = new_gateway(local_prefill_tokens=64)
    running.index.cached = {NodeName("decode-0"): 10}
    ask(running, 200)
    assert counts(running) == {"prefill-0": 0, "decode-0": 1}
    ask(running, 300)
    assert counts(running) == {"prefill-0": 1, "decode-0": 2}


def test_requests_in_flight_are_spread(new_gateway: Callable[..., RunningGateway]) -> None:
    running = new_gateway(num_prefill=2, num_decode=2)
    for node in running.nodes.values():
        running.do(node.gates.tokens.clear)
    body = {"model": MODEL, "prompt": [50] * 64, "n": 4, "max_tokens": 4, "ignore_eos": True}
    with httpx.stream(
        "POST", f"{running.url}/v1/completions", json={**body, "stream": True}
    ) as response:
        lines = response.iter_lines()  # kept: a reader that is dropped hangs up
        next(lines)
        running.until(lambda: running.gateway.measures.num_running == 4)
        assert counts(running) == {"prefill-0": 2, "prefill-1": 2, "decode-0": 2, "decode-1": 2}


def test_the_hand_off_names_this_gateway_and_the_decode_node(
    new_gateway: Callable[..., RunningGateway],
) -> None:
    running = new_gateway()
    ask(running, 20)
    [handoff] = running.prefill.handoffs
    assert handoff.decode == running.decode.info.id
    assert handoff.decode_address == running.decode.info.grpc_address
    assert running.decode.hub.is_open(handoff.gateway_id)
    assert len(handoff.transfer_id) == 16


def test_nodes_of_another_model_in_the_same_registry_are_left_alone(
    new_gateway: Callable[..., RunningGateway],
) -> None:
    running = new_gateway(num_prefill=0)

    async def add(model_name: str, name: str) -> None:
        node = FakeNode(
            NodeRole.PREFILL, name, peers=running.nodes, model_name=model_name, max_model_len=8
        )
        await running.see(await node.start())

    running.call(add("another-model", "foreign"))
    assert {entry.info.id.name for entry in running.gateway.nodes} == {"decode-0"}
    assert running.gateway.nodes.what_is_missing() == "no prefill node is ready"
    running.call(add("alias", "ours"))
    running.until(lambda: running.gateway.is_ready)


def test_a_node_that_none_of_the_other_role_is_like_is_told_once_and_shown(
    new_gateway: Callable[..., RunningGateway], caplog: pytest.LogCaptureFixture
) -> None:
    running = new_gateway()

    async def start() -> None:
        peers = running.nodes
        node = FakeNode(NodeRole.DECODE, "unlike", peers=peers, compatibility_hash="x")
        info = await node.start()
        await running.see(info)
        running.gateway.nodes.apply(ClusterView.of((running.prefill.info, info)))

    with caplog.at_level("WARNING"):
        running.call(start())
    told = [message for message in caplog.messages if "can exchange KV with no node" in message]
    assert [message.split()[1] for message in told] == ["unlike"]
    nodes = {entry.info.id.name: entry for entry in running.gateway.nodes}
    partners = {name: running.gateway.nodes.num_partners(e) for name, e in nodes.items()}
    assert partners == {"prefill-0": 1, "decode-0": 1, "unlike": 0}


def test_foreign_nodes_that_left_are_forgotten(new_gateway: Callable[..., RunningGateway]) -> None:
    running = new_gateway()
    ours = running.prefill.info

    def see_restarts() -> None:
        for number in range(1, 9):
            identity = replace(ours.id, name=NodeName("foreign"), incarnation=Incarnation(number))
            foreign = replace(ours, id=identity, model_name="another-model")
            running.gateway.nodes.apply(ClusterView.of((ours, foreign)))

    running.do(see_restarts)
    assert len(running.gateway.nodes._foreign) == 1
