"""What a node is to everyone else: its identity, its role, its state and its load.

Identity is name + incarnation. The incarnation is a 64-bit nonce drawn at each start, so a
message meant for the process that had this name before is recognised and refused.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NewType

NodeName = NewType("NodeName", str)
Incarnation = NewType("Incarnation", int)

# What the registry takes.
NODE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
HOST = re.compile(r"[A-Za-z0-9._:\[\]%-]{1,255}")


class NodeRole(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


class NodeState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    CORDONED = "cordoned"
    DRAINING = "draining"
    DRAINED = "drained"
    LOST = "lost"


def new_incarnation() -> Incarnation:
    """A nonce in [1, 2**63): fits a signed 64-bit field of any store."""
    return Incarnation(secrets.randbits(63) | 1)


@dataclass(frozen=True, slots=True)
class NodeId:
    name: NodeName
    incarnation: Incarnation


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLoad:
    """What a node last said of its own work. Hints for routing, never truth."""

    num_running: int = 0
    num_waiting: int = 0
    queued_tokens: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_cached_blocks: int = 0
    num_transfers: int = 0
    num_quarantined_blocks: int = 0
    num_gateways: int = 0  # that are connected with it


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeInfo:
    """One registry entry. `load` changes with each heartbeat, `state` by operators and drain."""

    id: NodeId
    role: NodeRole
    state: NodeState
    grpc_address: str  # "host:port" of the control plane
    metrics_address: str  # "host:port" of Prometheus metrics, "" when off
    model_name: str
    compatibility_hash: str  # equal on nodes that may exchange KV
    block_size: int
    max_model_len: int
    transports: tuple[str, ...] = ()  # transports in use towards peers, e.g. ("cuda_ipc",)
    fetches_prefixes: bool = False  # from other nodes, and gives its own away
    load: NodeLoad = field(default_factory=NodeLoad)
