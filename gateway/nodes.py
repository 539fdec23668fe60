"""The nodes this gateway knows: a client and a tally for each.

1. `apply` follows the cluster view: a new node gets a client, a changed entry fresh load.
2. `retire` takes a node out of use; its client closes when nothing runs through it any more.
3. `candidates` is what the router sees: each node with its load estimated for this moment.
4. `close` ends every session. To see these lost changes the view once more: nobody is connected to
   any more.

Heartbeats are up to a second old and know nothing of what was placed since. So each estimate is
what the node reported, plus what this gateway has placed there since, less what has ended. Other
gateways choose by the same report: what this one has placed, each of them is taken to have, too, or
all would find the same node idle until its next heartbeat.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.node import NodeInfo, NodeLoad, NodeName, NodeRole
from gateway.router import Candidate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from cluster.membership import ClusterView
    from cluster.node import NodeId
    from gateway.node_client import NodeClient

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Tally:
    """What this gateway has running on one node, now and at the node's last heartbeat."""

    queued_tokens: int = 0
    num_sequences: int = 0
    reserved_tokens: int = 0
    queued_tokens_then: int = 0
    num_sequences_then: int = 0
    reserved_tokens_then: int = 0

    def heartbeat(self) -> None:
        self.queued_tokens_then = self.queued_tokens
        self.num_sequences_then = self.num_sequences
        self.reserved_tokens_then = self.reserved_tokens


def estimate(reported: int, now: int, then: int, num_gateways: int = 1) -> int:
    """Never less than what this gateway itself has there."""
    since = now - then
    return max(now, reported + max(since, since * num_gateways))


class NodeEntry:
    """One node in use. `info` is its latest registry entry."""

    __slots__ = ("client", "info", "tally")

    def __init__(self, info: NodeInfo, client: NodeClient) -> None:
        self.info = info
        self.client = client
        self.tally = Tally()

    def refresh(self, info: NodeInfo) -> None:
        if info.load != self.info.load:
            self.tally.heartbeat()
        self.info = info

    def candidate(self, num_cached_tokens: int) -> Candidate:
        tally, load = self.tally, self.info.load
        num_gateways = max(1, load.num_gateways)
        return Candidate(
            node=self.info,
            is_connected=self.client.is_connected,
            queued_tokens=estimate(
                load.queued_tokens, tally.queued_tokens, tally.queued_tokens_then, num_gateways
            ),
            num_sequences=estimate(
                load.num_running + load.num_waiting,
                tally.num_sequences,
                tally.num_sequences_then,
                num_gateways,
            ),
            reserved_tokens=num_gateways
            * max(0, tally.reserved_tokens - tally.reserved_tokens_then),
            num_cached_tokens=num_cached_tokens,
        )


class Nodes:
    """`new_client` makes a client that is not started yet.

    Nodes of other models than `model_names` may share the registry; they are left alone, because
    this gateway's tokenizer is not theirs.
    """

    def __init__(
        self, new_client: Callable[[NodeInfo], NodeClient], *, model_names: frozenset[str]
    ) -> None:
        self._new_client = new_client
        self._model_names = model_names
        self._foreign: set[NodeId] = set()
        self._unlike: set[NodeId] = set()  # told of once
        self._entries: dict[NodeName, NodeEntry] = {}
        self._retired: set[NodeEntry] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._is_closed = False

    def __iter__(self) -> Iterator[NodeEntry]:
        return iter(self._entries.values())

    def get(self, name: str) -> NodeEntry | None:
        return self._entries.get(NodeName(name))

    def apply(self, view: ClusterView) -> None:
        if self._is_closed:
            return
        self._foreign.intersection_update({info.id for info in view.nodes.values()})
        for info in view.nodes.values():
            if not self._is_ours(info):
                continue
            entry = self._entries.get(info.id.name)
            if entry is not None and entry.info.id == info.id:
                entry.refresh(info)
                if entry.client.node.grpc_address == info.grpc_address:
                    continue
            if entry is not None:
                self.retire(entry.info.id)
            self._add(info)
        self._tell_of_unlike()

    def retire(self, node: NodeId) -> None:
        """No new work; closed at once, or when its last sequence has ended."""
        entry = self._entries.get(node.name)
        if entry is None or entry.info.id != node:
            return
        del self._entries[node.name]
        self._retired.add(entry)
        self.close_if_idle(entry)

    def close_if_idle(self, entry: NodeEntry) -> None:
        """To be called when a sequence on a retired node ends, or its session does."""
        if entry in self._retired and (
            entry.tally.num_sequences == 0 or not entry.client.is_connected
        ):
            self._retired.discard(entry)
            self._spawn_close(entry)

    def num_partners(self, entry: NodeEntry) -> int:
        """Known nodes of the other role that it can exchange KV with."""
        return sum(1 for other in self if _can_pair(entry.info, other.info))

    def candidates(self, num_cached_tokens: Mapping[NodeName, int]) -> list[Candidate]:
        return [entry.candidate(num_cached_tokens.get(entry.info.id.name, 0)) for entry in self]

    def max_model_len(self) -> int | None:
        """Of the smallest node that takes work; None while there is none."""
        lengths = [e.info.max_model_len for e in self if e.client.is_connected]
        return min(lengths, default=None)

    def what_is_missing(self) -> str | None:
        """Why no pair could take a request now, for the operator; None when one could."""
        ready: dict[NodeRole, set[str]] = {role: set() for role in NodeRole}
        for candidate in self.candidates({}):
            if candidate.can_take_work:
                ready[candidate.node.role].add(candidate.node.compatibility_hash)
        missing = [f"no {role} node is ready" for role in NodeRole if not ready[role]]
        if missing:
            return " and ".join(missing)
        if not ready[NodeRole.PREFILL] & ready[NodeRole.DECODE]:
            return "no prefill node and decode node are of the same model and KV layout"
        return None

    def decode_load(self) -> NodeLoad:
        """Blocks of all decode nodes together."""
        loads = [entry.info.load for entry in self if entry.info.role is NodeRole.DECODE]
        return NodeLoad(
            num_blocks=sum(load.num_blocks for load in loads),
            num_free_blocks=sum(load.num_free_blocks for load in loads),
        )

    async def close(self) -> None:
        self._is_closed = True
        for entry in [*self._entries.values(), *self._retired]:
            self._spawn_close(entry)
        self._entries.clear()
        self._retired.clear()
        await asyncio.gather(*self._closing, return_exceptions=True)

    def _is_ours(self, info: NodeInfo) -> bool:
        if info.model_name in self._model_names:
            return True
        if info.id not in self._foreign:
            self._foreign.add(info.id)
            logger.warning(
                "node %s serves %s, which this gateway does not; add it to --served-model-name "
                "if it is the same model",
                info.id.name,
                info.model_name,
            )
        return False

    def _tell_of_unlike(self) -> None:
        """Such a node is ready, and idle."""
        roles: dict[str, set[NodeRole]] = {}
        for entry in self:
            roles.setdefault(entry.info.compatibility_hash, set()).add(entry.info.role)
        if len(set().union(*roles.values())) < len(NodeRole):
            return  # what is missing then is nodes
        unlike = {e.info.id for e in self if len(roles[e.info.compatibility_hash]) == 1}
        told, self._unlike = self._unlike, unlike
        for node in unlike - told:
            logger.warning(
                "node %s can exchange KV with no node of the other role: model, KV layout, block "
                "size or version differ",
                node.name,
            )

    def _add(self, info: NodeInfo) -> None:
        client = self._new_client(info)
        self._entries[info.id.name] = NodeEntry(info, client)
        client.start()

    def _spawn_close(self, entry: NodeEntry) -> None:
        task = asyncio.create_task(entry.client.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


def _can_pair(one: NodeInfo, other: NodeInfo) -> bool:
    return one.role is not other.role and one.compatibility_hash == other.compatibility_hash
