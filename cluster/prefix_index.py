"""Which node has cached which prefix: hints in Redis, for routing.

Life of an entry
    1. A node computes a block and publishes it, parents before children. The key is made of the
       node's identity and the block's hash, the value is empty, the time to live is minutes.
    2. A gateway asks for the longest run of a prompt's blocks that each node has. Hashes are
       chained, so presence is monotone along the prompt: it samples some 32 positions per node,
       narrows to the gap where presence ends, and again: three round trips for 30,000 blocks.
    3. The node evicts the block and removes the entry, children before parents; or it dies, and
       nobody asks for its incarnation any more; or the time to live runs out.

Redis holds hints, never truth: a missing, stale or poisoned entry, or no Redis at all, costs a
cache hit. Nothing here raises because of Redis.

The incarnation is part of the key and not a value, so that a lookup is one MGET per round trip:
three of them take a third of the time of pipelined reads of a hash per block.
MGET also answers "nothing" for a key of another type, so poison is a miss by construction.
"""

from __future__ import annotations

import hashlib
from functools import partial
from typing import TYPE_CHECKING, cast

from cluster import clock as clocks
from cluster.node import NodeId
from cluster.redis_client import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import redis.asyncio as aioredis

    from cluster.clock import Clock
    from cluster.node import Incarnation, NodeName
    from cluster.prefix_hash import BlockHash
    from cluster.redis_client import Store

ENTRY_TTL_SECONDS = 600.0
LOOKUP_TIMEOUT_SECONDS = 0.010
MAX_ROUND_TRIPS = 3
MIN_SAMPLES = 32
PUBLISH_BATCH = 1000

_KEY_PREFIX = b"baton:b:"


class PrefixIndex:
    """`publish` is for nodes, `match` for gateways. Each call of theirs ends within its
    timeout, which begins with its turn at the store."""

    def __init__(
        self,
        store: Store,
        *,
        ttl_seconds: float = ENTRY_TTL_SECONDS,
        lookup_timeout_seconds: float = LOOKUP_TIMEOUT_SECONDS,
        clock: Clock = clocks.monotonic,
    ) -> None:
        self._store = store
        self._ttl_ms = int(ttl_seconds * 1000)
        self._lookup_timeout_seconds = lookup_timeout_seconds
        self._clock = clock

    async def publish(
        self, node: NodeId, stored: Sequence[BlockHash], removed: Sequence[BlockHash]
    ) -> bool:
        """Add `stored` (parents first), then drop `removed` (children first), in batches.

        False when Redis did not take all of it: the rest is not published. Publishing a block
        again renews its time to live.
        """
        tag = node_tag(node)
        try:
            for batch in _batches(stored):
                await self._store.call(partial(self._add, tag, batch))
            for batch in _batches(removed):
                await self._store.call(partial(self._remove, tag, batch))
        except StoreUnavailable:
            return False
        return True

    async def match(
        self,
        block_hashes: Sequence[BlockHash],
        incarnations: Mapping[NodeName, Incarnation],
    ) -> dict[NodeName, int]:
        """For each node that has some: how many leading blocks of the prompt it has cached.

        Empty when Redis does not answer within the lookup's timeout.
        """
        if not block_hashes or not incarnations:
            return {}
        tags = {name: node_tag(NodeId(name, i)) for name, i in incarnations.items()}
        search = PrefixSearch(len(block_hashes), list(tags))

        async def narrow(client: aioredis.Redis) -> None:
            while probes := search.next_probes():
                keys = [tags[name] + block_hashes[position] for name, position in probes]
                found = cast("list[bytes | None]", await client.mget(keys))
                search.narrow([value is not None for value in found])

        began = self._clock()
        try:
            await self._store.call(narrow, timeout_seconds=self._lookup_timeout_seconds)
        except StoreUnavailable:
            search.give_up()
            return {}
        self._store.metrics.lookup_seconds.observe(self._clock() - began)
        return search.runs()

    async def _add(
        self, tag: bytes, block_hashes: Sequence[BlockHash], client: aioredis.Redis
    ) -> None:
        async with client.pipeline(transaction=False) as pipe:
            for block_hash in block_hashes:
                pipe.set(tag + block_hash, b"", px=self._ttl_ms)
            await pipe.execute()

    async def _remove(
        self, tag: bytes, block_hashes: Sequence[BlockHash], client: aioredis.Redis
    ) -> None:
        await client.unlink(*(tag + block_hash for block_hash in block_hashes))


class PrefixSearch:
    """Pure: where presence ends along `num_blocks` positions, for each node, in three rounds.

    `next_probes` names (node, position) pairs, `narrow` takes whether each is present. No probes
    left means the answer is known. An entry missing in the middle only shortens the run.
    """

    def __init__(self, num_blocks: int, names: Sequence[NodeName]) -> None:
        self._num_samples = _samples_for(num_blocks)
        # Per node: positions below the first are present, from the second on absent.
        self._bounds = dict.fromkeys(names, (0, num_blocks))
        self._probes: list[tuple[NodeName, int]] = []
        self._is_given_up = False

    def next_probes(self) -> list[tuple[NodeName, int]]:
        self._probes = [
            (name, position)
            for name, (low, high) in self._bounds.items()
            for position in self._sample(low, high)
            if not self._is_given_up
        ]
        return self._probes

    def narrow(self, is_present: Sequence[bool]) -> None:
        closed: set[NodeName] = set()  # nodes whose first absent sample was met
        for (name, position), present in zip(self._probes, is_present, strict=True):
            if name in closed:
                continue
            low, high = self._bounds[name]
            if present:
                self._bounds[name] = (position + 1, high)
            else:
                self._bounds[name] = (low, position)
                closed.add(name)

    def give_up(self) -> None:
        """Nobody waits for the answer: there are no more probes."""
        self._is_given_up = True

    def runs(self) -> dict[NodeName, int]:
        """Known present leading blocks; nodes without any are left out."""
        return {name: low for name, (low, _) in self._bounds.items() if low}

    def _sample(self, low: int, high: int) -> Sequence[int]:
        """Positions from the unknown [low, high), both ends among them, evenly spread."""
        unknown, samples = high - low, self._num_samples
        if unknown <= samples:
            return range(low, high)
        return [low + i * (unknown - 1) // (samples - 1) for i in range(samples)]


def node_tag(node: NodeId) -> bytes:
    """What this incarnation's keys begin with; a fixed length, so that no two can be mixed up."""
    identity = f"{node.incarnation}:{node.name}".encode()
    return _KEY_PREFIX + hashlib.blake2b(identity, digest_size=8, person=b"baton/node").digest()


def _samples_for(num_blocks: int) -> int:
    """The fewest samples per round, but at least 32, that find any end in three rounds.

    k samples cut m unknowns into gaps of less than (m - 1) / (k - 1); the last round asks about
    up to k one by one.
    """
    samples = MIN_SAMPLES
    while (samples**2 + 1) * (samples - 1) + 1 < num_blocks:
        samples += 1
    return samples


def _batches(block_hashes: Sequence[BlockHash]) -> Iterator[Sequence[BlockHash]]:
    for start in range(0, len(block_hashes), PUBLISH_BATCH):
        yield block_hashes[start : start + PUBLISH_BATCH]
