"""Blocks that transfers and copies have: holds and reservations, until they give them back.

`reservation.py` has the life of both; here are the books of all of them. Only a hold that is
released, and a reservation that is cancelled, kept or attached, changes these again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.prefix_cache import BlockAccountingError
from engine.reservation import Hold, Reservation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from collections.abc import Set as AbstractSet

    from cluster.prefix_hash import BlockHash
    from engine.counted_blocks import CountedBlocks
    from engine.prefix_cache import Block
    from engine.sequence import Sequence


class LentBlocks:
    """`attach` hears of a sequence that got the blocks of a reservation, `mark_computed` when they
    can be hit."""

    def __init__(
        self,
        blocks: CountedBlocks,
        *,
        attach: Callable[[Sequence], None],
        mark_computed: Callable[[Sequence], None],
    ) -> None:
        self._blocks = blocks
        self._attach = attach
        self.mark_computed = mark_computed
        self._holds: dict[Hold, None] = {}
        self._reservations: dict[Reservation, None] = {}

    def owners(self) -> list[Hold | Reservation]:
        return [*self._holds, *self._reservations]

    def hold(self, block_ids: Iterable[int], owner: str, *, is_use: bool) -> Hold:
        hold = Hold(self, tuple(block_ids), owner, is_use=is_use)
        self._blocks.refer(hold.block_ids, owner)
        self._holds[hold] = None
        return hold

    def reserve(
        self, found: list[Block], num_blocks: int, *, num_tokens: int, owner: str
    ) -> Reservation | None:
        """`found`: the blocks whose KV is here already. None if there are not so many."""
        table = self._blocks.acquire(found, num_blocks)
        if table is None:
            return None
        reservation = Reservation(
            self, tuple(table), num_held_blocks=len(found), num_tokens=num_tokens, owner=owner
        )
        self._reservations[reservation] = None
        return reservation

    def distrust(self, suspects: AbstractSet[int] | None = None) -> None:
        """What is reserved of these blocks (None: of any) is never registered."""
        for reservation in self._reservations:
            if suspects is None or not suspects.isdisjoint(reservation.block_ids):
                reservation.is_cacheable = False

    def drop_hold(self, hold: Hold) -> None:
        """`Hold.release` alone calls this."""
        del self._holds[hold]
        self._blocks.release(hold.block_ids, is_use=hold.is_use)

    def drop_reservation(self, reservation: Reservation) -> None:
        """`Reservation.cancel` alone calls this."""
        del self._reservations[reservation]
        self._blocks.release(reservation.block_ids)

    def cache(self, reservation: Reservation, block_hashes: Iterable[BlockHash]) -> None:
        """`Reservation.keep` alone calls this."""
        if reservation.is_cacheable:
            hashes = tuple(block_hashes)
            self._blocks.register(reservation.block_ids, hashes, range(len(hashes)))
        self.drop_reservation(reservation)

    def hand_over(
        self, reservation: Reservation, sequence: Sequence, num_computed_tokens: int
    ) -> None:
        """`Reservation.attach` alone calls this."""
        if sequence.block_table:
            raise BlockAccountingError(f"{sequence!r} has blocks already.")
        del self._reservations[reservation]
        sequence.block_table = list(reservation.block_ids)
        sequence.num_computed_tokens = num_computed_tokens
        sequence.is_cacheable = reservation.is_cacheable
        self._attach(sequence)
