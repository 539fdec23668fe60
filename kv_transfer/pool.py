"""The paged pool as bytes, and the threads that move them to and from staging slots.

    pool  uint8 [num_layers, num_blocks, unit_bytes], a view of the KV tensor
    slot  uint8 [num_layers of the frame, blocks of the frame, unit_bytes], contiguous

A model that several GPUs share has one pool for each, with an equal part of the KV heads. In a
slot their units are whole again, so nodes with other numbers of GPUs exchange the same bytes. All
of these pools are mapped into this process; the moves run on the device of the first.

Moves run on a thread of their own, so that neither the copy nor the wait for the device stops
the event loop; a small one in host memory is done at once. On CUDA a move is queued on a side
stream; the thread then waits for an event, so a move has ended, and is visible to everyone,
when its coroutine returns.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from kernels.block_digest import block_digests
from kernels.copy_blocks import pack_blocks, unpack_blocks

if TYPE_CHECKING:
    from numpy.typing import NDArray

T = TypeVar("T")
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
        self._stream = _side_stream(self._pool.device)
        # On a device two threads: one queues the next move while the other waits for the last.
        num_threads = 1 if self._stream is None else 2
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="kv-pool")
        self._queueing = threading.Lock()

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

    async def gather(
        self,
        slot: torch.Tensor,
        *,
        layer_start: int,
        num_layers: int,
        block_ids: Sequence[int],
        after: torch.cuda.Event | None,
    ) -> NDArray[np.uint64]:
        """Copy blocks into the front of `slot` once `after` has happened.

        Returns their digests, `[num_layers, len(block_ids)]`.
        """
        work = functools.partial(self._gather, slot, layer_start, num_layers, block_ids, after)
        return await self._run(work, num_layers * len(block_ids))

    async def scatter(
        self,
        slot: torch.Tensor,
        *,
        layer_start: int,
        num_layers: int,
        block_ids: Sequence[int],
        accepts: Verdict,
    ) -> bool:
        """Copy the front of `slot` into blocks if `accepts` its digests `[num_layers,
        len(block_ids)]`; returns the verdict.

        On CUDA the copy is queued right behind the digests, to save a round trip to the device:
        the blocks are the transfer's alone until the verdict is known.
        """
        work = functools.partial(self._scatter, slot, layer_start, num_layers, block_ids, accepts)
        return await self._run(work, num_layers * len(block_ids))

    async def settle(self) -> None:
        """Wait until every device operation of this process on slots and blocks has ended."""
        if self._stream is not None:
            await self._on_thread(functools.partial(torch.cuda.synchronize, self.device))

    def close(self) -> None:
        self._threads.shutdown(wait=True)

    async def _run(self, work: Callable[[], T], num_units: int) -> T:
        """A move in host memory that takes less time than handing it to a thread is done here."""
        if self._stream is None and num_units * self.unit_bytes <= _INLINE_BYTES:
            return work()
        return await self._on_thread(work)

    async def _on_thread(self, work: Callable[[], T]) -> T:
        """A move cannot be stopped half-way: a cancelled caller still waits for its end."""
        moving = asyncio.get_running_loop().run_in_executor(self._threads, work)
        try:
            return await asyncio.shield(moving)
        except asyncio.CancelledError:
            await asyncio.wait([moving])
            raise

    def _gather(
        self,
        slot: torch.Tensor,
        layer_start: int,
        num_layers: int,
        block_ids: Sequence[int],
        after: torch.cuda.Event | None,
    ) -> NDArray[np.uint64]:
        num_units = num_layers * len(block_ids)
        front = slot[: num_units * self.unit_bytes]
        out = front.view(num_layers, len(block_ids), self.unit_bytes)
        if self._stream is None:
            self._pack(out, layer_start, num_layers, self._ids(block_ids))
            return _as_array(block_digests(front, num_units), num_layers)
        with self._queueing, torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            self._pack(out, layer_start, num_layers, self._ids(block_ids))
            digests = _to_host(block_digests(front, num_units))
            done = _record(self._stream)
        done.synchronize()
        return _as_array(digests, num_layers)

    def _scatter(
        self,
        slot: torch.Tensor,
        layer_start: int,
        num_layers: int,
        block_ids: Sequence[int],
        accepts: Verdict,
    ) -> bool:
        num_units = num_layers * len(block_ids)
        front = slot[: num_units * self.unit_bytes]
        src = front.view(num_layers, len(block_ids), self.unit_bytes)
        if self._stream is None:
            if not accepts(_as_array(block_digests(front, num_units), num_layers)):
                return False
            self._unpack(src, layer_start, num_layers, self._ids(block_ids))
            return True
        with self._queueing, torch.cuda.stream(self._stream):
            digests = _to_host(block_digests(front, num_units))
            self._unpack(src, layer_start, num_layers, self._ids(block_ids))
            done = _record(self._stream)
        done.synchronize()
        return accepts(_as_array(digests, num_layers))

    def _pack(self, out: torch.Tensor, first: int, num_layers: int, ids: torch.Tensor) -> None:
        for part, shard in enumerate(self._shards):
            pack_blocks(shard, first, num_layers, ids, out, part=part, num_parts=len(self._shards))

    def _unpack(self, src: torch.Tensor, first: int, num_layers: int, ids: torch.Tensor) -> None:
        for part, shard in enumerate(self._shards):
            unpack_blocks(
                src, shard, first, num_layers, ids, part=part, num_parts=len(self._shards)
            )

    def _ids(self, block_ids: Sequence[int]) -> torch.Tensor:
        ids = torch.tensor(block_ids, dtype=torch.int64)
        if self._stream is None:
            return ids
        return ids.pin_memory().to(self.device, non_blocking=True)


def _to_host(digests: torch.Tensor) -> torch.Tensor:
    """Into pinned memory, so that the copy is only queued."""
    host = torch.empty(digests.shape, dtype=digests.dtype, pin_memory=True)
    return host.copy_(digests, non_blocking=True)


def _record(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """An event behind what was queued; waiting for it sleeps instead of spinning."""
    done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    done.record(stream)
    return done


def _side_stream(device: torch.device) -> torch.cuda.Stream | None:
    if device.type != "cuda":
        return None
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _as_array(digests: torch.Tensor, num_layers: int) -> NDArray[np.uint64]:
    """int64 `[num_units]` in host memory -> uint64 `[num_layers, num_blocks]`."""
    return digests.numpy().view(np.uint64).reshape(num_layers, -1)
