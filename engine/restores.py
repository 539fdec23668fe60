"""Brings a cached prefix into the pool for who reads it from there: another node that is given it.

Life of a restore
    1. ASKED    `begin`: the blocks that the pool has of the prefix are found, and those that host
                memory has behind them. If none of these may be brought, that is the answer.
    2. WAITING  a load of somebody else brings the next block already: when it has ended, ASKED
                again. What it brought is in the pool then, or nowhere.
    3. BRINGING a reservation covers what was found and the new blocks, and a copy loads these.
    4. HELD     the copy has ended. The blocks up to the first that is not what was saved go to the
                prefix cache, and who asked gets a hold on all of them, which it releases.
Who asked may go away at any time (its future is cancelled): the copy ends all the same, its blocks
stay cached, and nobody holds them.

What may be brought
    - what takes less time than who asks can spare, by the rate of the loads before and what waits
      for the bus already;
    - into blocks that nobody refers to and that are not the last copy of what they hold; a share of
      the pool stays free for who runs here. With none to be had the answer is what the pool has.
So a restore never waits for blocks, and takes none from a sequence.

Who owns what: found blocks belong to the reservation, new ones to it and to the copy, slots to the
copy; then all blocks to the hold.

Pure: no memory, no clock. Belongs to the block manager and its thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf
    from concurrent.futures import Future

    from cluster.prefix_hash import BlockHash
    from engine.block_manager import BlockManager
    from engine.host_blocks import HostBlocks
    from engine.host_tier import HostEntry
    from engine.reservation import Hold, Reservation

_FREE_SHARE = 8  # 1/8 of the pool is left to who runs here


class Bus(Protocol):
    """What is known of the way from host memory."""

    def load_seconds(self, num_blocks: int) -> float:
        """How long a load of so many blocks takes; 0 as long as nobody knows."""
        ...


@dataclass(frozen=True, slots=True)
class Wish:
    """`seconds_per_block`: what bringing one out of host memory may take; 0: bring none."""

    block_hashes: SequenceOf[BlockHash]
    owner: str
    seconds_per_block: float
    answer: Future[Hold]

    def fulfil(self, hold: Hold) -> None:
        """Give it away, or, with nobody there to take it, back."""
        if self.answer.set_running_or_notify_cancel():
            self.answer.set_result(hold)
        else:
            hold.release()


@dataclass(slots=True)
class RestoreStats:
    """Blocks of prefixes that others asked for and only host memory had."""

    num_restored: int = 0
    num_bad: int = 0  # or their copy failed
    num_without_room: int = 0
    num_too_slow: int = 0


class Restores:
    """`bus` None: there is no host memory below the pool."""

    def __init__(self, manager: BlockManager, bus: Bus | None = None) -> None:
        self._manager = manager
        self._bus = bus
        self.stats = RestoreStats()

    @property
    def block_size(self) -> int:
        return self._manager.block_size

    def begin(self, wish: Wish) -> None:
        """The wish is answered with a hold on the longest beginning that is to be had, maybe on
        nothing: now, or at the end of a copy."""
        if wish.answer.cancelled():
            return
        found = self._manager.match_prefix(wish.block_hashes)
        host = self._manager.host
        if host is None or not self._begin_copy(wish, host, found):
            wish.fulfil(self._manager.hold(found, wish.owner))

    # ---- steps --------------------------------------------------------------------------

    def _begin_copy(self, wish: Wish, host: HostBlocks, found: SequenceOf[int]) -> bool:
        """Whether the answer waits for the end of a copy, now begun or somebody else's."""
        entries = host.tier.match(wish.block_hashes[len(found) :])
        if not entries:
            return False
        other = host.load_of(entries[0])
        num_loads = host.num_loading_blocks + (len(entries) if other is None else 0)
        if not self._is_quick(wish, num_loads, len(entries)):
            return False
        if other is not None:
            other.on_end.append(lambda _: self.begin(wish))
            return True
        entries = list(takewhile(lambda entry: entry.num_loads == 0, entries))
        room = self._room_beside(host, found)
        self.stats.num_without_room += max(0, len(entries) - room)
        return bool(entries[:room]) and self._bring(wish, host, len(found), entries[:room])

    def _is_quick(self, wish: Wish, num_loads: int, num_blocks: int) -> bool:
        """Whether `num_blocks` that come with the last of so many are worth waiting for."""
        if self._bus is None or not wish.seconds_per_block > 0:
            return False
        if self._bus.load_seconds(num_loads) <= wish.seconds_per_block * num_blocks:
            return True
        self.stats.num_too_slow += num_blocks
        return False

    def _room_beside(self, host: HostBlocks, found: SequenceOf[int]) -> int:
        """How many blocks may be taken when those found are held as well."""
        manager = self._manager
        num_held = sum(manager.num_references(block_id) == 0 for block_id in found)
        num_kept = host.num_dirty + manager.num_blocks // _FREE_SHARE
        return max(0, manager.num_free_blocks - num_held - num_kept)

    def _bring(
        self, wish: Wish, host: HostBlocks, num_found: int, entries: SequenceOf[HostEntry]
    ) -> bool:
        manager, num_blocks = self._manager, num_found + len(entries)
        reservation = manager.reserve(
            wish.block_hashes[:num_blocks], num_blocks * manager.block_size, wish.owner
        )
        if reservation is None:
            return False
        copy = host.bring(reservation.block_ids[num_found:], entries, wish.owner)
        copy.on_end.append(lambda num_good: self._brought(wish, reservation, num_good))
        return True

    def _brought(self, wish: Wish, reservation: Reservation, num_good: int) -> None:
        num_asked = len(reservation.block_ids) - reservation.num_held_blocks
        self.stats.num_restored += num_good
        self.stats.num_bad += num_asked - num_good
        num_blocks = reservation.num_held_blocks + num_good
        if not reservation.is_cacheable:  # forgotten meanwhile: not to be trusted, or not wanted
            num_blocks = 0
        hold = self._manager.hold(reservation.block_ids[:num_blocks], wish.owner)
        reservation.keep(wish.block_hashes[:num_blocks])
        wish.fulfil(hold)
