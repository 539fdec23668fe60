"""Who owns blocks that no sequence owns: holds and reservations.

A block in transfer belongs to the transfer. "Freed while a peer reads or writes it" cannot be
said here: blocks come back only through the object that its owner was given.

Life of a hold:        hold -> release (again: nothing happens)
Life of a reservation: reserve -> attach or keep, once, or cancel (again, or after: nothing)
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Protocol

from engine.prefix_cache import BlockAccountingError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cluster.prefix_hash import BlockHash
    from engine.sequence import Sequence


class Keeper(Protocol):
    """What holds and reservations need of those who keep the books (`lent_blocks.py`)."""

    def drop_hold(self, hold: Hold) -> None: ...
    def drop_reservation(self, reservation: Reservation) -> None: ...
    def cache(self, reservation: Reservation, block_hashes: Iterable[BlockHash]) -> None: ...
    def mark_computed(self, sequence: Sequence) -> None: ...
    def hand_over(
        self, reservation: Reservation, sequence: Sequence, num_computed_tokens: int
    ) -> None: ...


class Hold:
    """One reference to each of `block_ids`, kept for `owner` until released. Unless `is_use`, they
    were not used but saved elsewhere, and are evicted before others."""

    __slots__ = ("_is_released", "_keeper", "block_ids", "is_use", "owner")

    def __init__(
        self, keeper: Keeper, block_ids: tuple[int, ...], owner: str, *, is_use: bool = True
    ) -> None:
        self._keeper = keeper
        self._is_released = False
        self.block_ids = block_ids
        self.owner = owner
        self.is_use = is_use

    def __repr__(self) -> str:
        return f"Hold({self.owner!r}, {len(self.block_ids)} blocks)"

    @property
    def is_released(self) -> bool:
        return self._is_released

    def release(self) -> None:
        """Drop the references. Idempotent."""
        if not self._is_released:
            self._is_released = True
            self._keeper.drop_hold(self)


class ReservationState(Enum):
    OPEN = "open"
    ATTACHED = "attached"
    KEPT = "kept"
    CANCELLED = "cancelled"


class Reservation:
    """Blocks for the KV of `num_tokens` tokens that comes from elsewhere.

    `block_ids` covers all positions in order. The first `num_held_blocks` of them are computed
    here already and must not be written; the others are nobody else's.
    """

    __slots__ = (
        "_keeper",
        "block_ids",
        "is_cacheable",
        "num_held_blocks",
        "num_tokens",
        "owner",
        "state",
    )

    def __init__(
        self,
        keeper: Keeper,
        block_ids: tuple[int, ...],
        *,
        num_held_blocks: int,
        num_tokens: int,
        owner: str,
    ) -> None:
        self._keeper = keeper
        self.block_ids = block_ids
        self.num_held_blocks = num_held_blocks
        self.num_tokens = num_tokens
        self.owner = owner
        self.state = ReservationState.OPEN
        self.is_cacheable = True  # the block manager's note: no reset since

    def __repr__(self) -> str:
        return f"Reservation({self.owner!r}, {len(self.block_ids)} blocks, {self.state.value})"

    def attach(
        self,
        sequence: Sequence,
        *,
        num_computed_tokens: int | None = None,
        is_hit_at_once: bool = True,
    ) -> None:
        """Give the blocks to `sequence`, which has none: the KV of its first
        `num_computed_tokens` tokens (default: all reserved ones) is in place and verified.

        From here it can be found in the prefix cache, or, not `is_hit_at_once`, from the end of
        its first step at the latest, which need not wait for a long prompt to be entered there.
        Freeing the sequence frees it.
        Raises `BlockAccountingError` the second time, after `cancel`, or if nothing would be
        left to compute.
        """
        if self.state is not ReservationState.OPEN:
            raise BlockAccountingError(f"{self!r} cannot be attached.")
        computed = self.num_tokens if num_computed_tokens is None else num_computed_tokens
        if not 0 <= computed <= self.num_tokens or computed >= sequence.num_tokens:
            raise BlockAccountingError(f"{computed} computed tokens do not fit {sequence!r}.")
        self._keeper.hand_over(self, sequence, computed)
        if is_hit_at_once:
            self._keeper.mark_computed(sequence)
        self.state = ReservationState.ATTACHED

    def keep(self, block_hashes: Iterable[BlockHash]) -> None:
        """Give the blocks to the prefix cache, each under its hash: their KV is in place and
        verified, and nobody runs on it yet. Raises `BlockAccountingError` unless open."""
        if self.state is not ReservationState.OPEN:
            raise BlockAccountingError(f"{self!r} cannot be kept.")
        self.state = ReservationState.KEPT
        self._keeper.cache(self, block_hashes)

    def cancel(self) -> None:
        """Give the blocks back. Idempotent; nothing happens once attached or kept."""
        if self.state is ReservationState.OPEN:
            self.state = ReservationState.CANCELLED
            self._keeper.drop_reservation(self)
