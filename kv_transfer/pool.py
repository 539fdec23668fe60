"""The paged pool as bytes, and what moves them to and from staging slots.

    pool  uint8 [num_layers, num_blocks, unit_bytes], a view of the KV tensor
    slot  uint8 [num_layers of the frame, blocks of the frame, unit_bytes], contiguous, then the
          sealed digests of these units, uint64

A model that several GPUs share has one pool for each, with an equal part of the KV heads. In a
slot their units are whole again, so nodes with other numbers of GPUs exchange the same bytes. All
of these pools are mapped into this process; the moves run on the device of the first.

Life of a move
    1. `begin_gather` or `begin_scatter`. On CUDA it is queued on a side stream before the call
       returns (`device_moves.py`). In host memory (`host_moves.py`) a small move is done at once,
       a large one is handed to a thread.
    2. Its future is done when it has ended and is visible to everyone. It cannot be stopped
       half-way: a cancelled caller still waits for its end (`end`).
"""

from __future__ import annotations

import asyncio
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from kv_transfer.device_moves import DeviceMoves
from kv_transfer.digests import DigestKind
from kv_transfer.host_moves import HostMoves
from kv_transfer.polling import EventQueue

if TYPE_CHECKING:
    from collections.abc import Callable

    from kv_transfer.frame_place import FramePlace
    from kv_transfer.rehearsal import Rehearsal
    from kv_transfer.transports.base import Piece

T = TypeVar("T")
_INLINE_BYTES = 256 * 1024


class TransferPool:
    """Gathers blocks into slots and scatters slots into blocks, with digests of each unit."""

    def __init__(self, *shards: torch.Tensor, takes_digests: bool = True) -> None:
        """One pool, or the pools of all ranks in their order, alike in shape. `takes_digests`
        False, to measure what they cost: all that arrives is right."""
        self._pool = shards[0]
        for each in shards:
            if each.dtype != torch.uint8 or each.dim() != 3 or each.shape != self._pool.shape:
                raise TypeError("A pool must be uint8 [num_layers, num_blocks, bytes].")
        self._num_shards = len(shards)
        self.takes_digests = takes_digests
        moves = DeviceMoves if self._pool.is_cuda else HostMoves
        self._moves: DeviceMoves | HostMoves = moves(shards, takes_digests)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kv-pool")
        self._computing = EventQueue(self.rehearse_departure)
        self.rehearsal: Rehearsal | None = None
        self.is_decoding: Callable[[], bool] = lambda: False  # on this device, in this process

    @property
    def device(self) -> torch.device:
        return self._pool.device

    @property
    def num_layers(self) -> int:
        return self._pool.shape[0]

    @property
    def unit_bytes(self) -> int:
        """Of a whole unit, the parts of all ranks together."""
        return self._pool.shape[2] * self._num_shards

    @property
    def digest_kinds(self) -> tuple[DigestKind, ...]:
        """What can be computed where the pool is, the fastest first."""
        return self._moves.digest_kinds

    def rehearse_departure(self) -> None:
        """What comes next, while there is nothing to do but to wait for it."""
        if self.rehearsal is not None:
            self.rehearsal.depart()

    def rehearse_arrival(self) -> None:
        """The same of a receiver."""
        if self.rehearsal is not None:
            self.rehearsal.arrive()

    def when_computed(
        self, done: Any, tell: Callable[[Exception | None], None], *, is_urgent: bool
    ) -> None:
        """Call `tell` when `done`, an event of the model's stream, has happened, with the error if
        the device has one. Events are given in their order."""
        self._computing.when(done, tell, is_urgent=is_urgent)

    def prepare(self, table: tuple[int, ...]) -> None:
        """Scatters into these blocks will come, whose frames name the table."""
        if isinstance(self._moves, DeviceMoves):
            self._moves.prepare(table)

    def begin_gather(
        self,
        slot: torch.Tensor,
        frame: FramePlace,
        *,
        after: torch.Event | None,
        digest: DigestKind = DigestKind.MULTIPLY_SHIFT,
    ) -> asyncio.Future[None]:
        """Copy blocks into the front of `slot` once `after` has happened, and write their sealed
        digests behind them."""
        moves = self._moves
        if isinstance(moves, DeviceMoves):
            return moves.gather(slot, frame, after)
        work = functools.partial(moves.gather, slot, frame, digest)
        return self._begin(work, frame.num_units * self.unit_bytes)

    def begin_scatter(
        self,
        slot: torch.Tensor,
        frame: FramePlace,
        *,
        digest: DigestKind = DigestKind.MULTIPLY_SHIFT,
    ) -> asyncio.Future[bool]:
        """Copy the front of `slot` into blocks, if the digests behind it fit it and these places;
        gives the verdict.

        On CUDA the copy is made in the same pass as the digests: the blocks are the transfer's
        alone until the verdict is known. There `slot` may be the sender's, mapped.
        """
        moves = self._moves
        if isinstance(moves, DeviceMoves):
            return moves.scatter(slot, frame, is_decoding=self.is_decoding())
        work = functools.partial(moves.scatter, slot, frame, digest)
        return self._begin(work, frame.num_units * self.unit_bytes)

    # ---- without a slot, in host memory --------------------------------------------------------

    def has_pieces(self, digest: DigestKind) -> bool:
        """Whether blocks can be sent and received where they are, in pieces."""
        return isinstance(self._moves, HostMoves) and self._moves.has_pieces(digest)

    def pieces(self, frame: FramePlace) -> list[Piece]:
        """The units, one layer after the other. Only where there are pieces."""
        if not isinstance(self._moves, HostMoves):
            raise TypeError("pieces are for pools in host memory")
        return self._moves.pieces(frame)

    async def end(self, move: asyncio.Future[T]) -> T:
        """Wait for a move, also when cancelled."""
        try:
            return await asyncio.shield(move)
        except asyncio.CancelledError:
            await asyncio.wait([move])
            raise

    async def settle(self) -> None:
        """Wait until every device operation of this process on slots and blocks has ended."""
        if self._pool.is_cuda:
            work = functools.partial(torch.cuda.synchronize, self.device)
            await self.end(asyncio.get_running_loop().run_in_executor(self._thread, work))

    def close(self) -> None:
        self._thread.shutdown(wait=True)

    # ---- in host memory ------------------------------------------------------------------------

    def _begin(self, work: Callable[[], T], num_bytes: int) -> asyncio.Future[T]:
        """A move that takes less time than handing it to a thread is done here."""
        loop = asyncio.get_running_loop()
        if num_bytes > _INLINE_BYTES:
            return loop.run_in_executor(self._thread, work)
        done: asyncio.Future[T] = loop.create_future()
        done.set_result(work())
        return done
