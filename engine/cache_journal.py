"""Which blocks can be hit on any tier of this node, and what of that has changed.

A tier says `stored` when a block can be found there and `removed` when it cannot any more; a block
is gone when the last tier has lost it. `take_events` gives the net change since it was asked last,
for the index that other processes read: stored blocks parent first, removed blocks leaf first, so
that at every moment a hash in the index implies its ancestors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.prefix_hash import BlockHash


@dataclass(frozen=True, slots=True)
class CacheEvents:
    """Net changes of the cache, disjoint: `stored` parent first, `removed` leaf first."""

    stored: tuple[BlockHash, ...] = ()
    removed: tuple[BlockHash, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.stored or self.removed)


class CacheJournal:
    """Counts the tiers that have each block."""

    def __init__(self) -> None:
        self._num_tiers: dict[BlockHash, int] = {}  # by the time a block came: parents first
        self._pending: dict[BlockHash, bool] = {}  # True: stored, False: removed
        self._on_going: Callable[[BlockHash], None] | None = None

    def __contains__(self, block_hash: BlockHash) -> bool:
        return block_hash in self._num_tiers

    def before_going(self, drop_children: Callable[[BlockHash], None]) -> None:
        """`drop_children` is called when the last tier loses a block: no prompt can reach those
        below it any more, so they go first."""
        self._on_going = drop_children

    def hashes(self) -> list[BlockHash]:
        """All that can be hit, parents first."""
        return list(self._num_tiers)

    def stored(self, block_hash: BlockHash) -> None:
        num_tiers = self._num_tiers.get(block_hash, 0)
        self._num_tiers[block_hash] = num_tiers + 1
        if num_tiers == 0:
            self._note(block_hash, stored=True)

    def removed(self, block_hash: BlockHash) -> None:
        self._num_tiers[block_hash] -= 1
        if self._num_tiers[block_hash] > 0:
            return
        if self._on_going is not None:
            self._on_going(block_hash)
        del self._num_tiers[block_hash]
        self._note(block_hash, stored=False)

    def take_events(self) -> CacheEvents:
        pending, self._pending = self._pending, {}
        return CacheEvents(
            stored=tuple(block_hash for block_hash, stored in pending.items() if stored),
            removed=tuple(block_hash for block_hash, stored in pending.items() if not stored),
        )

    def _note(self, block_hash: BlockHash, *, stored: bool) -> None:
        """Two opposite changes between two reports are none."""
        if self._pending.pop(block_hash, stored) is stored:
            self._pending[block_hash] = stored
