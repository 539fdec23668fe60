"""Who has which block of the paged KV cache: whose the references are that `counted_blocks` counts.

They are in the tables of sequences, in holds and in reservations. `allocate` gives a sequence its
blocks, `mark_computed` lets others hit what it has computed, `free` takes them back.

A step that is launched and not collected may still write to the blocks of a sequence that is
freed meanwhile. Its references are dropped only when all steps launched before are collected: in
between nobody, and no transfer, gets the blocks.

Not thread-safe: the engine's thread owns it, and holds and reservations are released there.
"""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING

from engine import block_audit
from engine.cache_journal import CacheEvents, CacheJournal
from engine.counted_blocks import CountedBlocks
from engine.host_blocks import HostBlocks
from engine.host_tier import HostEntry, HostTier
from engine.lent_blocks import LentBlocks
from engine.prefix_cache import BlockAccountingError
from engine.steps_in_flight import StepsInFlight

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Sequence as SequenceOf

    from cluster.prefix_hash import BlockHash
    from engine.prefix_cache import Block
    from engine.reservation import Hold, Reservation
    from engine.sequence import Sequence


class BlockManager:
    """Owns `num_blocks` blocks of `block_size` tokens. No call waits; each is O(1) per block it
    touches."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_prefix_caching: bool = True,
        num_host_blocks: int = 0,
        num_ahead: int = 0,
        num_at_once: int = 64,
    ) -> None:
        """`num_host_blocks`: slots of host memory for blocks that must go, see `HostBlocks`.
        Whoever gives some carries out the copies."""
        if num_blocks < 1 or block_size < 1:
            raise ValueError("num_blocks and block_size must be positive.")
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._journal = CacheJournal()
        self._blocks = CountedBlocks(num_blocks, self._journal)
        self.host: HostBlocks | None = None  # what goes on between the pool and host memory
        if num_host_blocks and enable_prefix_caching:
            tier = HostTier(num_host_blocks, self._journal)
            self.host = HostBlocks(self, tier, num_ahead=num_ahead, num_at_once=num_at_once)
            self._blocks.host = self.host
        self._sequences: dict[Sequence, None] = {}  # those with a block table
        self._lent = LentBlocks(
            self._blocks, attach=self._attached, mark_computed=self.mark_computed
        )
        self._steps = StepsInFlight()
        self.num_hit_tokens = 0  # of prompts, found in the pool at first admission; since the start

    # ---- counts -------------------------------------------------------------------------

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that an allocation could take now: free, or cached and unreferenced."""
        return self._blocks.num_free

    @property
    def num_ready_blocks(self) -> int:
        """Blocks that an allocation could take without anything being lost."""
        return self._blocks.num_ready

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that nobody refers to and a prompt can still hit."""
        return self._blocks.num_cached

    @property
    def num_referenced_blocks(self) -> int:
        return self.num_blocks - self.num_free_blocks

    @property
    def num_held_blocks(self) -> int:
        """References by holds and reservations: what is in transfer."""
        return sum(len(owner.block_ids) for owner in self._lent.owners())

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    # ---- sequences ----------------------------------------------------------------------

    def match_prefix(self, block_hashes: SequenceOf[BlockHash]) -> list[int]:
        """Ids of the longest run of computed cached blocks. Takes no reference."""
        found = self._blocks.match(block_hashes, len(block_hashes))
        return [block.block_id for block in found]

    def num_cached(self, block_hashes: SequenceOf[BlockHash]) -> int:
        """How many of these, from the first on, are on any tier."""
        return sum(1 for _ in takewhile(self._journal.__contains__, block_hashes))

    def allocate(self, sequence: Sequence, num_tokens: int, *, headroom: int = 0) -> bool:
        """Make the block table cover `num_tokens` tokens. False, and no change, if it cannot,
        or if fewer than `headroom` blocks would be left to take.

        A sequence without blocks first gets the computed blocks its tokens begin with, at
        most so many that its last token stays to be computed.
        """
        table = sequence.block_table
        if not table:
            return self._allocate_first(sequence, num_tokens, headroom)
        num_new = self.num_blocks_for(num_tokens) - len(table)
        if num_new <= 0:
            return True
        if num_new + headroom > self.num_free_blocks:
            return False
        table.extend(self._blocks.take(num_new))
        return True

    def mark_computed(self, sequence: Sequence) -> None:
        """Let others hit the full blocks below `num_computed_tokens`."""
        num_full_blocks = sequence.num_computed_tokens // self.block_size
        if sequence.num_registered_blocks >= num_full_blocks:
            return
        if self.enable_prefix_caching and sequence.is_cacheable:
            sequence.extend_block_hashes()
            new = range(sequence.num_registered_blocks, num_full_blocks)
            self._blocks.register(sequence.block_table, sequence.block_hashes, new)
            sequence.num_registered_blocks = num_full_blocks

    def free(self, sequence: Sequence) -> None:
        """Drop the sequence's references, at the latest when the steps launched so far are
        collected; its KV is not here any more. Idempotent."""
        self._sequences.pop(sequence, None)
        if self.host is not None:
            self.host.leave(sequence)
        table, sequence.block_table = sequence.block_table, []
        sequence.num_computed_tokens = 0
        sequence.num_registered_blocks = 0
        sequence.is_cacheable = True
        if table and not self._steps.keeps(table):
            self._blocks.release(table)

    def preempt(self, sequence: Sequence) -> None:
        """`free`, for a sequence that will want its KV again; nothing is in flight. It goes to
        host memory as far as there is room."""
        if self.host is not None:
            self.host.save(sequence)
        self.free(sequence)

    def step_launched(self) -> None:
        """A step works on blocks from now on, until `step_collected`. Steps end in order."""
        self._steps.launched()

    def step_collected(self) -> None:
        """The oldest of the launched steps does not touch blocks any more."""
        for table in self._steps.collected():
            self._blocks.release(table)

    # ---- transfers ----------------------------------------------------------------------

    def hold(self, block_ids: Iterable[int], owner: str, *, is_use: bool = True) -> Hold:
        """One more reference to blocks that are referenced or cached."""
        return self._lent.hold(block_ids, owner, is_use=is_use)

    def reserve(
        self, block_hashes: SequenceOf[BlockHash], num_tokens: int, owner: str = ""
    ) -> Reservation | None:
        """Blocks for the KV of `num_tokens` tokens that another node has computed. None if
        they are not to be had now."""
        found = self._blocks.match(block_hashes, num_tokens // self.block_size)
        num_blocks = self.num_blocks_for(num_tokens)
        return self._lent.reserve(found, num_blocks, num_tokens=num_tokens, owner=owner)

    # ---- the prefix cache ---------------------------------------------------------------

    def take_events(self) -> CacheEvents:
        """What changed in the cache since the last call."""
        return self._journal.take_events()

    def cached_hashes(self) -> list[BlockHash]:
        """All that can be hit now, parents first: to publish it anew."""
        return self._journal.hashes()

    def reset_prefix_cache(self) -> int:
        """Forget every computed block; sequences keep theirs, and never register them.
        Returns how many were forgotten."""
        num_forgotten = len(self._journal.hashes())
        if self.host is not None:
            self.host.tier.clear()
        self._blocks.forget_all()
        for sequence in self._sequences:
            sequence.is_cacheable = False
        self._lent.distrust()
        return num_forgotten

    def forget(self, sequence: Sequence) -> None:
        """The KV of this sequence cannot be trusted: nobody hits any of its blocks, or what
        extends them, again. Costs a walk over all owners; for failures only."""
        suspects = set(sequence.block_table)
        hashes = sequence.block_hashes[: len(sequence.block_table)]
        if self.host is not None:
            self.host.tier.forget(hashes)
        self._blocks.forget(hashes)
        for other in self._sequences:
            if not suspects.isdisjoint(other.block_table):
                other.is_cacheable = False
        self._lent.distrust(suspects)

    # ---- host memory --------------------------------------------------------------------

    @property
    def num_coming_blocks(self) -> int:
        """Blocks that can be taken once copies that run now have ended."""
        return 0 if self.host is None else self.host.num_coming_blocks

    def would_load(self, sequence: Sequence) -> bool:
        """Whether `allocate` would begin a load for this sequence, which has no blocks."""
        if self.host is None:
            return False
        return bool(self._find(sequence)[1])

    def num_references(self, block_id: int) -> int:
        return self._blocks.num_references(block_id)

    # ---- integrity ----------------------------------------------------------------------

    def owners(self) -> list[str]:
        """Who refers to blocks now, in words."""
        return [repr(owner) for owner in (*self._sequences, *self._lent.owners())]

    def check_integrity(self) -> None:
        """Raise `BlockAccountingError` if the books do not balance. O(num_blocks)."""
        tables = [sequence.block_table for sequence in self._sequences]
        tables += self._steps.tables()
        tables += [list(owner.block_ids) for owner in self._lent.owners()]
        for sequence in self._sequences:
            block_audit.check_sequence(sequence, self.block_size)
        self._blocks.check_integrity(tables)
        if self.host is not None:
            self.host.tier.check_integrity()

    # ---- steps --------------------------------------------------------------------------

    def _attached(self, sequence: Sequence) -> None:
        self._sequences[sequence] = None

    def _allocate_first(self, sequence: Sequence, num_tokens: int, headroom: int) -> bool:
        if sequence.num_computed_tokens:
            raise BlockAccountingError(f"{sequence!r} lost its blocks unnoticed.")
        sequence.extend_block_hashes()
        found, entries = self._find(sequence)
        if entries is None:
            return False
        num_blocks = self.num_blocks_for(num_tokens)
        entries = entries[: max(0, num_blocks - len(found))]
        table = self._blocks.acquire(found, num_blocks, headroom)
        if table is None:
            return False
        sequence.block_table = table
        sequence.num_computed_tokens = len(found) * self.block_size
        sequence.num_registered_blocks = len(found)
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self.num_hit_tokens += sequence.num_computed_tokens
        self._sequences[sequence] = None
        if self.host is not None and entries:
            self.host.load(sequence, entries)
        return True

    def _find(self, sequence: Sequence) -> tuple[list[Block], list[HostEntry] | None]:
        """What the pool has of its beginning, and what host memory has behind that."""
        limit = (sequence.num_tokens - 1) // self.block_size
        found = self._blocks.match(sequence.block_hashes, limit)
        return found, self.host.find(sequence, len(found), limit) if self.host else []
