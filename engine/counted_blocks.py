"""The blocks of the pool, and how many refer to each. Whose references these are, the block manager
knows.

Life of a block
    1. Free, on the free list.
    2. Referenced: `acquire` refers to cached blocks and takes others, free ones or, evicted, cached
       ones. Sequences that begin alike refer to the same blocks, without copies.
    3. Computed: `register` enters full blocks in the prefix cache. Only these are hit.
       Two sequences that compute the same block at once both keep theirs; the first one is
       registered, the second stays private and is freed without a trace.
    4. No reference left: cached if registered, else free. With memory of the host below the pool,
       `host_blocks.py` goes on from here.

At every moment free + cached + referenced == num_blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine import block_audit
from engine.prefix_cache import Block, BlockAccountingError, PrefixCache

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Sequence as SequenceOf

    from cluster.prefix_hash import BlockHash
    from engine.cache_journal import CacheJournal
    from engine.host_blocks import HostBlocks


class CountedBlocks:
    """`host` hears what becomes of cached blocks. Each call is O(1) per block it touches."""

    def __init__(self, num_blocks: int, journal: CacheJournal) -> None:
        self.host: HostBlocks | None = None
        self._blocks = [Block(block_id) for block_id in range(num_blocks)]
        self._free = self._blocks[::-1]
        self._cache = PrefixCache(journal)
        self._num_releases = 0

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def num_free(self) -> int:
        """Blocks that could be taken now: free, or cached and unreferenced."""
        return len(self._free) + self._cache.num_parked

    @property
    def num_ready(self) -> int:
        """Blocks that could be taken without anything being lost."""
        return len(self._free) + self._cache.num_saved

    @property
    def num_cached(self) -> int:
        """Blocks that nobody refers to and a prompt can still hit."""
        return self._cache.num_parked

    def num_references(self, block_id: int) -> int:
        return self._blocks[block_id].ref_count

    def match(self, block_hashes: SequenceOf[BlockHash], limit: int) -> list[Block]:
        """The longest computed run from the first hash on, at most `limit` blocks. No reference."""
        return self._cache.match(block_hashes, limit)

    def acquire(self, found: list[Block], num_blocks: int, headroom: int = 0) -> list[int] | None:
        """References to `found`, then to new blocks up to `num_blocks` in all. None, and no change,
        if there are not so many, or fewer than `headroom` would be left to take."""
        num_new = max(0, num_blocks - len(found))
        num_revived = sum(block.ref_count == 0 for block in found)
        if num_new + num_revived + headroom > self.num_free:
            return None
        self._refer(found)
        return [block.block_id for block in found] + self.take(num_new)

    def take(self, num_blocks: int) -> list[int]:
        """New blocks with one reference each; the caller knows there are enough."""
        taken = []
        for _ in range(num_blocks):
            if not self._free:
                self._reclaim(self._cache.evict())
            block = self._free.pop()
            block.ref_count = 1
            taken.append(block.block_id)
        return taken

    def refer(self, block_ids: Iterable[int], owner: str) -> None:
        """One more reference to blocks that are referenced or cached."""
        blocks = [self._blocks[block_id] for block_id in block_ids]
        for block in blocks:
            if block.ref_count == 0 and block.block_hash is None:
                raise BlockAccountingError(f"Block {block.block_id} is free: {owner} is late.")
        self._refer(blocks)

    def release(self, block_ids: Iterable[int], *, is_use: bool = True) -> None:
        """Drop one reference each. Unless `is_use`, they were not used but saved elsewhere."""
        self._num_releases += 1
        parked = []
        for block_id in block_ids:
            block = self._blocks[block_id]
            block.ref_count -= 1
            if block.ref_count == 0:
                if block.block_hash is None:
                    self._free.append(block)
                else:
                    parked.append(block)
        self._park(parked, is_use)

    def register(
        self, table: SequenceOf[int], hashes: SequenceOf[BlockHash], indices: range
    ) -> None:
        """Name the blocks at `indices` that have no namesake yet, each after its parent.

        A parent may have been evicted since (another sequence's copy was registered, and this
        one has its own): then start again at the first ancestor that is missing.
        """
        first = indices.start
        while first > 0 and hashes[first - 1] not in self._cache:
            first -= 1
        for index in range(first, indices.stop):
            if hashes[index] not in self._cache:
                parent = hashes[index - 1] if index else None
                self._cache.register(self._blocks[table[index]], hashes[index], parent)

    def forget(self, block_hashes: Iterable[BlockHash]) -> None:
        """Nobody hits these blocks, or what extends them, again."""
        self._reclaim(self._cache.forget(block_hashes), is_eviction=False)

    def forget_all(self) -> None:
        self._reclaim(self._cache.clear(), is_eviction=False)

    def check_integrity(self, tables: Iterable[SequenceOf[int]]) -> None:
        """Raise `BlockAccountingError` unless `tables` hold all references. O(num_blocks)."""
        block_audit.check_counts(self._blocks, tables)
        self._cache.check_integrity()
        block_audit.check_states(self._blocks, self._free, list(self._cache.parked()))

    def _refer(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            if block.ref_count == 0:
                self._cache.unpark(block)
                if self.host is not None:
                    self.host.unparked(block)
            block.ref_count += 1

    def _park(self, blocks: list[Block], is_use: bool) -> None:
        if is_use:
            for block in blocks:
                self._cache.park(block, self._num_releases)
            if self.host is not None:
                self.host.parked(blocks)
        else:
            for block in blocks:
                self._cache.park_saved(block)

    def _reclaim(self, blocks: list[Block], *, is_eviction: bool = True) -> None:
        """They are free: nobody refers to them, and they can be hit no more."""
        self._free.extend(blocks)
        if self.host is not None:
            (self.host.evicted if is_eviction else self.host.forgotten)(blocks)
