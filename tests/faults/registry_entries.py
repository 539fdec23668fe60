"""Entries of the registry that nobody lives up to."""

from __future__ import annotations

from dataclasses import replace

from cluster.node import NodeId, NodeInfo, NodeName, new_incarnation
from cluster.registry import decode_entry


def stale_entry(document: bytes, *, name: str, port: int = 1) -> NodeInfo:
    """The entry of a node, under another name and at an address where nobody listens."""
    return replace(
        decode_entry(document),
        id=NodeId(NodeName(name), new_incarnation()),
        grpc_address=f"127.0.0.1:{port}",
    )
