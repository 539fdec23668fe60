"""The paged pool as bytes, and the threads that move them to and from staging slots.

    pool  uint8 [num_layers, num_blocks, unit_bytes], a view of the KV tensor
    slot  uint8 [num_layers of the frame, blocks of the frame, unit_bytes], contiguous

A model that several GPUs share has one pool for each, with an equal part of the KV heads. In a
slot their units are whole again, so nodes with other numbers of GPUs exchange the same bytes. All
of these pools are mapped into this process; the moves run on the device of the first.

Life of a move
    1. `begin_gather` or `begin_scatter`. On CUDA it is queued on a side stream before the call
       returns, so the caller may prepare what comes after while the device works. In host memory a
       small move is done at once, a large one is handed to a thread.
    2. `end` waits for it: on CUDA a thread waits for an event, so the event loop does not. A move
       that has ended is visible to everyone. It cannot be stopped half-way: a cancelled caller
       still waits for its end.
"""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from kernels.block_digest import block_digests
from kernels.copy_blocks import pack_blocks, unpack_blocks
from kv_transfer.digests import DigestKind
from kv_transfer.host_moves import HostMoves
from kv_transfer.protocol import MAX_UNITS_PER_FRAME

if TYPE_CHECKING:
    from numpy.typing import NDArray

T = TypeVar("T")
Move = Awaitable
_INLINE_BYTES = 256 * 1024
Verdict = Callable[["NDArray[np.uint64]"], bool]


class TransferPool:
    """Gathers blocks into slots and scatters slots into blocks, with digests of each unit."""

    def __init__(self, *shards: torch.Tensor) -> None:
        """One pool, or the pools of all ranks in their order, alike in shape."""
        self._pool = shards[0]
        for each in shards:
            if each.dtype != torch.uint8 or each.dim() != 3 or each.shape != self._pool.shape:
                raise TypeError("A pool must be uint8 [num_layers, num_blocks, bytes].")
        self._shards = shards
        self._in_host = HostMoves(shards)
        self._stream = _side_stream(self._pool.device)
        # On a device threads only wait: for a gather and a scatter at a time.
        num_threads = 1 if self._stream is None else 2
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="kv-pool")
        self._notes: deque[_Notes] = deque()
        if self._stream is not None:
            self._warm_up()

    @property
    def device(self) -> torch.device:
        return self._pool.device

    @property
    def num_layers(self) -> int:
        return self._pool.shape[0]

    @property
    def unit_bytes(self) -> int:
        """Of a whole unit, the parts of all ranks together."""
        return self._pool.shape[2] * len(self._shards)

    @property
    def digest_kinds(self) -> tuple[DigestKind, ...]:
        """What can be computed where the pool is, the fastest first."""
        if self._stream is None:
            return self._in_host.digest_kinds
        return (DigestKind.MULTIPLY_SHIFT,)

    def begin_gather(
        self,
        slot: torch.Tensor,
        *,
        layer_start: int,
        num_layers: int,
        block_ids: Sequence[int],
        after: torch.Event | None,
        digest: DigestKind = DigestKind.MULTIPLY_SHIFT,
    ) -> Move[NDArray[np.uint64]]:
        """Copy blocks into the front of `slot` once `after` has happened. Gives their digests,
        `[num_layers, len(block_ids)]`."""
        frame = _Frame(slot, layer_start, num_layers, block_ids, self.unit_bytes)
        if self._stream is None:
            return self._begin(functools.partial(self._gather_here, frame, digest), frame)
        notes = self._take_notes()
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            self._pack(frame, self._ids(notes, block_ids))
            self._queue_digests(notes, frame)
        return self._wait_for(notes, frame)

    def begin_scatter(
        self,
        slot: torch.Tensor,
        *,
        layer_start: int,
        num_layers: int,
        block_ids: Sequence[int],
        accepts: Verdict,
        digest: DigestKind = DigestKind.MULTIPLY_SHIFT,
    ) -> Move[bool]:
        """Copy the front of `slot` into blocks if `accepts` its digests `[num_layers,
        len(block_ids)]`; gives the verdict.

        On CUDA the copy is queued right behind the digests, to save a round trip to the device:
        the blocks are the transfer's alone until the verdict is known.
        """
        frame = _Frame(slot, layer_start, num_layers, block_ids, self.unit_bytes)
        if self._stream is None:
            work = functools.partial(self._scatter_here, frame, digest, accepts)
            return self._begin(work, frame)
        notes = self._take_notes()
        with torch.cuda.stream(self._stream):
            self._queue_digests(notes, frame)
            self._unpack(frame, self._ids(notes, block_ids))
            notes.done.record(self._stream)
        digests = self._wait_for(notes, frame)
        return _judge(digests, accepts)

    async def end(self, move: Move[T]) -> T:
        """Wait for a move, also when cancelled."""
        moving = asyncio.ensure_future(move)
        try:
            return await asyncio.shield(moving)
        except asyncio.CancelledError:
            await asyncio.wait([moving])
            raise

    async def settle(self) -> None:
        """Wait until every device operation of this process on slots and blocks has ended."""
        if self._stream is not None:
            work = functools.partial(torch.cuda.synchronize, self.device)
            await self.end(asyncio.get_running_loop().run_in_executor(self._threads, work))

    def close(self) -> None:
        self._threads.shutdown(wait=True)

    # ---- in host memory ------------------------------------------------------------------------

    def _begin(self, work: Callable[[], T], frame: _Frame) -> Move[T]:
        """A move that takes less time than handing it to a thread is done here."""
        loop = asyncio.get_running_loop()
        if frame.front.numel() > _INLINE_BYTES:
            return loop.run_in_executor(self._threads, work)
        done: asyncio.Future[T] = loop.create_future()
        done.set_result(work())
        return done

    def _gather_here(self, frame: _Frame, digest: DigestKind) -> NDArray[np.uint64]:
        return self._in_host.gather(frame.units, frame.layer_start, frame.block_ids, digest)

    def _scatter_here(self, frame: _Frame, digest: DigestKind, accepts: Verdict) -> bool:
        return self._in_host.scatter(
            frame.units, frame.layer_start, frame.block_ids, digest, accepts
        )

    # ---- on a device -----------------------------------------------------------------------------

    def _take_notes(self) -> _Notes:
        try:
            return self._notes.pop()
        except IndexError:
            return _Notes()

    def _ids(self, notes: _Notes, block_ids: Sequence[int]) -> torch.Tensor:
        num_ids = len(block_ids)
        notes.ids_view[:num_ids] = block_ids
        return notes.ids[:num_ids].to(self.device, non_blocking=True)

    def _queue_digests(self, notes: _Notes, frame: _Frame) -> None:
        digests = block_digests(frame.front, frame.num_units)
        notes.digests[: frame.num_units].copy_(digests, non_blocking=True)
        notes.done.record(self._stream)

    def _wait_for(self, notes: _Notes, frame: _Frame) -> Move[NDArray[np.uint64]]:
        def wait() -> NDArray[np.uint64]:
            notes.done.synchronize()
            digests = _as_array(notes.digests[: frame.num_units], frame.num_layers).copy()
            self._notes.append(notes)
            return digests

        return asyncio.get_running_loop().run_in_executor(self._threads, wait)

    def _warm_up(self) -> None:
        """Compile the kernels now: the first move must not stop the event loop."""
        slot = torch.empty(self.unit_bytes, dtype=torch.uint8, device=self.device)
        frame = _Frame(slot, 0, 1, (0,), self.unit_bytes)
        ids = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._pack(frame, ids)
        block_digests(frame.front, 1)
        self._unpack(frame, ids)
        torch.cuda.synchronize(self.device)

    def _pack(self, frame: _Frame, ids: torch.Tensor) -> None:
        for part, shard in enumerate(self._shards):
            pack_blocks(
                shard, frame.layer_start, frame.num_layers, ids, frame.units,
                part=part, num_parts=len(self._shards),
            )  # fmt: skip

    def _unpack(self, frame: _Frame, ids: torch.Tensor) -> None:
        for part, shard in enumerate(self._shards):
            unpack_blocks(
                frame.units, shard, frame.layer_start, frame.num_layers, ids,
                part=part, num_parts=len(self._shards),
            )  # fmt: skip


class _Frame:
    """The front of a slot, as the units of `num_layers` layers of these blocks."""

    __slots__ = ("block_ids", "front", "layer_start", "num_layers", "num_units", "units")

    def __init__(
        self,
        slot: torch.Tensor,
        layer_start: int,
        num_layers: int,
        block_ids: Sequence[int],
        unit_bytes: int,
    ) -> None:
        self.layer_start = layer_start
        self.num_layers = num_layers
        self.block_ids = block_ids
        self.num_units = num_layers * len(block_ids)
        self.front = slot[: self.num_units * unit_bytes]
        self.units = self.front.view(num_layers, len(block_ids), unit_bytes)


class _Notes:
    """Pinned memory that one move on a device needs, and the event behind it. Used again: making
    either takes longer than most moves. The event spins when waited for: one that sleeps is woken
    up to a millisecond late. A gather of layers that are still computed keeps its thread spinning
    as long as they take."""

    __slots__ = ("digests", "done", "ids", "ids_view")

    def __init__(self) -> None:
        self.ids = torch.empty(MAX_UNITS_PER_FRAME, dtype=torch.int64, pin_memory=True)
        self.ids_view = self.ids.numpy()
        self.digests = torch.empty(MAX_UNITS_PER_FRAME, dtype=torch.int64, pin_memory=True)
        self.done = torch.cuda.Event()  # type: ignore[no-untyped-call]


async def _judge(digests: Move[NDArray[np.uint64]], accepts: Verdict) -> bool:
    return accepts(await digests)


def _side_stream(device: torch.device) -> torch.cuda.Stream | None:
    if device.type != "cuda":
        return None
    # Ahead of the model's kernels: a move is short, and somebody waits for it.
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]


def _as_array(digests: torch.Tensor, num_layers: int) -> NDArray[np.uint64]:
    """int64 `[num_units]` in host memory -> uint64 `[num_layers, num_blocks]`."""
    return digests.numpy().view(np.uint64).reshape(num_layers, -1)
