"""How much of a prompt each node has cached, as far as the shared index knows.

A hint for routing, so it may cost little: it is skipped where it could change nothing, bounded
in time by the index, and a missing answer is an empty one.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from cluster.node import NodeRole
from cluster.prefix_hash import BlockHash, hash_blocks, root_hash

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from concurrent.futures import Executor

    from cluster.node import Incarnation, NodeInfo, NodeName
    from cluster.request import SequenceRequest
    from gateway.nodes import Nodes
    from gateway.policy import Policy

INLINE_TOKENS = 16_384


class Index(Protocol):
    """The part of `cluster.prefix_index.PrefixIndex` that reads."""

    async def match(
        self, block_hashes: Sequence[BlockHash], incarnations: Mapping[NodeName, Incarnation]
    ) -> dict[NodeName, int]: ...


class PrefixLookup:
    def __init__(self, index: Index, nodes: Nodes, executor: Executor) -> None:
        self._index = index
        self._nodes = nodes
        self._executor = executor

    async def num_cached_tokens(
        self, request: SequenceRequest, policy: Policy
    ) -> Mapping[NodeName, int]:
        """By node; nodes that have nothing are left out. At least one token is left to compute."""
        ready = [c.node for c in self._nodes.candidates({}) if c.can_take_work]
        if not _matters(ready, policy):
            return {}
        pools: dict[tuple[str, int], list[NodeInfo]] = {}
        for node in ready:
            pools.setdefault((node.compatibility_hash, node.block_size), []).append(node)
        found: dict[NodeName, int] = {}
        for (model_key, block_size), nodes in pools.items():
            hashes = await self._hashes(request, model_key, block_size)
            runs = await self._index.match(hashes, {n.id.name: n.id.incarnation for n in nodes})
            for name, num_blocks in runs.items():
                most = len(request.prompt_token_ids) - 1
                found[name] = min(num_blocks * block_size, most)
        return found

    async def _hashes(
        self, request: SequenceRequest, model_key: str, block_size: int
    ) -> list[BlockHash]:
        root = root_hash(model_key, request.cache_salt)
        token_ids = request.prompt_token_ids
        if len(token_ids) <= INLINE_TOKENS:
            return hash_blocks(token_ids, block_size, root)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, hash_blocks, token_ids, block_size, root)


def _matters(ready: Sequence[NodeInfo], policy: Policy) -> bool:
    """A lone pair that always hands off, and fetches nothing, leaves nothing to decide."""
    if policy.local_prefill_tokens > 0:
        return True
    if any(node.fetches_prefixes for node in ready):
        return True
    num_prefill = sum(node.role is NodeRole.PREFILL for node in ready)
    return num_prefill > 1 or len(ready) - num_prefill > 1
