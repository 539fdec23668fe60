"""What moves between the blocks of the pool and the slots of host memory, and when.

Life of a block over the tiers
    1. Computed, registered, its last reference gone: cached on the device, and *dirty*, for it is
       nowhere else.
    2. `take_copies` saves the dirty ones that would be evicted first, until as many blocks as
       prompts are likely to ask for next are free, or saved and first to go. So an eviction never
       waits, no step waits for a copy, and blocks that are used again soon are not copied at all. A
       dirty block that must go all the same is lost, and computed again when somebody asks for it.
    3. Clean and evicted: host memory alone has it. It is announced to others all the while.
    4. A sequence that gets its blocks (`BlockManager.allocate`) and whose prefix goes on in host
       memory gets these by a load. It has its blocks and its place, and is scheduled once they
       are there and verified; others run meanwhile. Who needs one of them at the same time waits
       for that load instead of starting its own.
    5. The digest of each block is taken when it is written to host memory, and compared after it
       was read. From the first that differs on, the sequence computes its blocks; the bad one is
       forgotten with all that extend it.
    6. The same for who reads the pool from outside (`bring`): `restores.py` says when.
    7. A running sequence that must give up its blocks (`save`) is written too, with its last,
       partly filled one. It resumes as in 4. Whatever is not there any more is computed.

Who owns what: a copy holds its blocks (`Hold`) and its slots until it ends, whatever becomes of
the sequence meanwhile. `take_copies` gives the copies to start, `end` takes their outcome.

Pure: no memory, no clock. Belongs to the block manager and its thread.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Protocol

from engine.block_copies import BlockCopy, CopyKind, HostStats
from engine.block_names import names_of, tail_of
from engine.prefix_cache import hash_of

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Sequence as SequenceOf

    from engine.host_tier import HostEntry, HostTier
    from engine.prefix_cache import Block
    from engine.reservation import Hold
    from engine.sequence import Sequence

_MIN_CLEANED = 64  # blocks: a save has a price of its own


class BlockPool(Protocol):
    """What is needed of the block manager."""

    @property
    def block_size(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def num_ready_blocks(self) -> int:
        """Free, or among the first to be evicted and saved."""
        ...

    def hold(self, block_ids: Iterable[int], owner: str, *, is_use: bool = True) -> Hold: ...
    def mark_computed(self, sequence: Sequence) -> None: ...
    def num_references(self, block_id: int) -> int: ...


class HostBlocks:
    """`num_ahead`: blocks to keep free or saved, at least; half of the pool anyway. `num_at_once`:
    most blocks of one save ahead, which is begun between two steps: more than a step computes, but
    1/8 of the pool at most, for they cannot be evicted meanwhile."""

    def __init__(
        self, pool: BlockPool, tier: HostTier, *, num_ahead: int, num_at_once: int
    ) -> None:
        self.tier = tier
        self.stats = HostStats()
        self._pool = pool
        self._num_ahead = min(pool.num_blocks, max(num_ahead, pool.num_blocks // 2))
        self._max_cleaned = max(1, min(num_at_once, pool.num_blocks // 8))
        self._dirty: dict[Block, None] = {}  # cached, on no other tier; oldest first
        self._copies: dict[BlockCopy, None] = {}
        self._new_copies: list[BlockCopy] = []
        self._cleaning: BlockCopy | None = None

    @property
    def num_dirty(self) -> int:
        return len(self._dirty)

    @property
    def num_copies(self) -> int:
        """Asked for and not ended."""
        return len(self._copies)

    @property
    def num_coming_blocks(self) -> int:
        """Blocks that will be free, or can be evicted, when the copies under way have ended."""
        return sum(
            self._pool.num_references(block_id) == 1
            for copy in self._copies
            for block_id in copy.block_ids
        )

    @property
    def num_loading_blocks(self) -> int:
        """Blocks of loads that have not ended."""
        return sum(len(copy.entries) for copy in self._copies if copy.kind is CopyKind.LOAD)

    @property
    def is_settled(self) -> bool:
        """No copy is under way, and none is to be begun."""
        return not self._copies and self._num_to_clean() == 0

    def take_copies(self) -> list[BlockCopy]:
        """The copies to start now, in any order; `end` is called for each."""
        self._clean()
        copies, self._new_copies = self._new_copies, []
        return copies

    def end(self, copy: BlockCopy, digests: SequenceOf[int] | None) -> None:
        """A copy has ended, with the digest of each block as it was moved; None: it failed, and
        who knows what was written."""
        del self._copies[copy]
        if copy is self._cleaning:
            self._cleaning = None
        if digests is None:
            self.stats.num_failed_copies += 1
        if copy.kind is CopyKind.SAVE:
            self.tier.end_save(copy.entries, digests)
            num_good = 0 if digests is None else len(digests)
        else:
            num_good = self._end_load(copy, digests)
        copy.hold.release()
        for tell in copy.on_end:
            tell(num_good)

    # ---- what the cache on the device does ----------------------------------------------

    def parked(self, blocks: SequenceOf[Block]) -> None:
        """Nobody refers to these cached blocks any more. Parents before children."""
        for block in reversed(blocks):
            if hash_of(block) in self.tier:
                self.tier.touch(hash_of(block))
            else:
                self._dirty[block] = None

    def unparked(self, block: Block) -> None:
        """Somebody refers to it again."""
        self._dirty.pop(block, None)

    def evicted(self, blocks: Iterable[Block]) -> None:
        """They are given to somebody else."""
        num_dirty = len(self._dirty)
        self.forgotten(blocks)
        self.stats.num_lost_blocks += num_dirty - len(self._dirty)

    def forgotten(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            self._dirty.pop(block, None)

    # ---- a sequence comes and goes ------------------------------------------------------

    def find(self, sequence: Sequence, num_found: int, limit: int) -> list[HostEntry] | None:
        """What host memory has of the sequence behind its first `num_found` blocks, of at most
        `limit`; after a preemption also the block behind these. None while another load brings
        some of it."""
        entries = self.tier.match(sequence.block_hashes[num_found:limit])
        if sequence.num_preemptions and num_found + len(entries) == limit:
            name = tail_of(sequence, self._pool.block_size)
            entries += [] if name is None else self.tier.match([name])
        if any(entry.num_loads for entry in entries):
            return None
        return entries

    def load(self, sequence: Sequence, entries: SequenceOf[HostEntry]) -> None:
        """Bring `entries` into the blocks of its table behind those that are computed."""
        first_token = sequence.num_computed_tokens
        first = first_token // self._pool.block_size
        block_ids = tuple(sequence.block_table[first : first + len(entries)])
        end_token = first_token + len(entries) * self._pool.block_size
        self._begin(
            BlockCopy(
                CopyKind.LOAD,
                block_ids,
                tuple(entries),
                self._pool.hold(block_ids, f"load for {sequence.sequence_id}"),
                sequence,
                first_token,
                min(end_token, sequence.num_tokens - 1),
            )
        )
        self.tier.begin_load(entries)
        sequence.is_loading = True

    def bring(
        self, block_ids: SequenceOf[int], entries: SequenceOf[HostEntry], owner: str
    ) -> BlockCopy:
        """Bring `entries` into blocks that no sequence has; see `on_end` of the copy."""
        hold = self._pool.hold(block_ids, f"load for {owner}")
        copy = self._begin(BlockCopy(CopyKind.LOAD, tuple(block_ids), tuple(entries), hold))
        self.tier.begin_load(entries)
        return copy

    def load_of(self, entry: HostEntry) -> BlockCopy | None:
        """The load that brings it now, if there is one."""
        loads = (copy for copy in self._copies if copy.kind is CopyKind.LOAD)
        return next((copy for copy in loads if entry in copy.entries), None)

    def save(self, sequence: Sequence) -> None:
        """Write what is computed of a sequence that is about to lose its blocks; as much from its
        beginning on as there is room for. Nothing of it is in flight."""
        if not sequence.is_cacheable:
            return
        num_computed = sequence.num_computed_tokens
        names = names_of(sequence, self._pool.block_size)
        for name in reversed(names):
            self.tier.touch(name)  # they are not to make room for each other
        missing = [index for index, name in enumerate(names) if name not in self.tier]
        num_here = len(names) - len(missing)
        missing = missing[: max(0, self.tier.num_available - num_here)]
        num_full = num_computed // self._pool.block_size
        block_ids, entries = [], []
        for index in reversed(missing):
            parent = names[index - 1] if index else None
            entry = self.tier.begin_save(names[index], parent, is_private=index >= num_full)
            if entry is not None:
                entries.append(entry)
                block_ids.append(sequence.block_table[index])
        self._begin_save(block_ids, entries, f"save of {sequence.sequence_id}")

    def leave(self, sequence: Sequence) -> None:
        """It loses its blocks; a load for it is nobody's any more."""
        if sequence.is_loading:
            sequence.is_loading = False
            for copy in self._copies:
                if copy.sequence is sequence:
                    copy.sequence = None

    # ---- steps --------------------------------------------------------------------------

    def _clean(self) -> None:
        """Save those that would be evicted next, unless enough of them are clean."""
        num_blocks = self._num_to_clean()
        if num_blocks == 0 or self._cleaning is not None:
            return
        block_ids, entries = [], []
        for block in tuple(islice(self._dirty, num_blocks)):
            parent = None if block.parent is None else hash_of(block.parent)
            entry = self.tier.begin_save(hash_of(block), parent)
            if entry is not None:
                entries.append(entry)
                block_ids.append(block.block_id)
            else:
                del self._dirty[block]  # on its way already, or no slot is to be had
        self._cleaning = self._begin_save(block_ids, entries, "save")

    def _num_to_clean(self) -> int:
        """Not a few at a time: what is begun goes beyond what is needed."""
        num_lacking = self._num_ahead - self._pool.num_ready_blocks
        if not self._dirty or num_lacking <= 0:
            return 0
        return min(max(num_lacking, _MIN_CLEANED), self._max_cleaned, len(self._dirty))

    def _begin_save(
        self, block_ids: SequenceOf[int], entries: SequenceOf[HostEntry], owner: str
    ) -> BlockCopy | None:
        if not block_ids:
            return None
        hold = self._pool.hold(block_ids, owner, is_use=False)
        return self._begin(BlockCopy(CopyKind.SAVE, tuple(block_ids), tuple(entries), hold))

    def _begin(self, copy: BlockCopy) -> BlockCopy:
        self._copies[copy] = None
        self._new_copies.append(copy)
        return copy

    def _end_load(self, copy: BlockCopy, digests: SequenceOf[int] | None) -> int:
        num_good = 0
        for entry, digest in zip(copy.entries, digests or (), strict=False):
            if entry.is_dropped or entry.digest != digest:
                break
            num_good += 1
        self.stats.num_loaded_blocks += num_good
        is_whole = num_good == len(copy.entries)
        if not is_whole:
            self._give_up(copy, num_good, digests)
        elif copy.entries[-1].is_private:  # nobody else asks for it
            self.tier.forget([copy.entries[-1].block_hash])
        self.tier.end_load(copy.entries)
        if copy.sequence is not None:
            num_tokens = copy.first_token + num_good * self._pool.block_size
            self._loaded(copy.sequence, copy, copy.end_token if is_whole else num_tokens)
        return num_good

    def _loaded(self, sequence: Sequence, copy: BlockCopy, num_tokens: int) -> None:
        sequence.is_loading = False
        sequence.num_computed_tokens = num_tokens
        self._pool.mark_computed(sequence)
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self.stats.num_hit_tokens += sequence.num_computed_tokens - copy.first_token

    def _give_up(self, copy: BlockCopy, num_good: int, digests: SequenceOf[int] | None) -> None:
        """Whoever asks for what is behind the good ones computes it."""
        bad = copy.entries[num_good]
        if digests is not None and not bad.is_dropped:
            self.stats.num_bad_blocks += 1
        if not bad.is_dropped:
            self.tier.forget([bad.block_hash])
