"""What a gateway takes a node to have, between two of its heartbeats."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

from cluster.node import NodeLoad
from gateway.nodes import NodeEntry
from tests.cluster.conftest import node_info

CONNECTED = cast("Any", SimpleNamespace(is_connected=True))


def entry(**load: int) -> NodeEntry:
    return NodeEntry(node_info(load=NodeLoad(**load)), CONNECTED)


def beat(node: NodeEntry, **load: int) -> None:
    node.refresh(replace(node.info, load=NodeLoad(**load)))


def test_what_was_placed_since_counts_until_the_node_reports_it() -> None:
    node = entry()
    node.tally.queued_tokens = 500
    assert node.candidate(0).queued_tokens == 500
    beat(node, queued_tokens=700)
    assert node.candidate(0).queued_tokens == 700
    node.tally.queued_tokens = 0
    assert node.candidate(0).queued_tokens == 200


def test_each_other_gateway_is_taken_to_place_as_much_by_the_same_report() -> None:
    """Or a node that reports little gets the prompts of all of them until its next heartbeat."""
    node = entry(queued_tokens=1000, num_running=2, num_gateways=3)
    node.tally.queued_tokens = 500
    node.tally.num_sequences = 1
    node.tally.reserved_tokens = 600
    seen = node.candidate(0)
    assert seen.queued_tokens == 1000 + 3 * 500
    assert seen.num_sequences == 2 + 3
    assert seen.reserved_tokens == 3 * 600


def test_what_has_ended_here_has_ended_nowhere_else() -> None:
    node = entry(num_gateways=3)
    node.tally.queued_tokens = 500
    beat(node, queued_tokens=900, num_gateways=3)
    node.tally.queued_tokens = 0
    assert node.candidate(0).queued_tokens == 400
