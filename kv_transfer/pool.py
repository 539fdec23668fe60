"""The paged pool as bytes, and the one thread that moves them to and from staging slots.

    pool  uint8 [num_layers, num_blocks, unit_bytes], a view of the KV tensor
    slot  uint8 [num_layers of the frame, blocks of the frame, unit_bytes], contiguous

Each move runs on a thread of its own, so that neither the copy nor the wait for the device
stops the event loop. On CUDA it is queued on a side stream; the thread then waits for an event,
so a move has ended, and is visible to everyone, when its coroutine returns. Moves run one at a
time, in the order they were asked for.
"""

from __future__ import annotations

import asyncio
import functools
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
Verdict = Callable[["NDArray[np.uint64]"], bool]


class TransferPool:
    """Gathers blocks into slots and scatters slots into blocks, with digests of each unit."""

    def __init__(self, pool: torch.Tensor) -> None:
        if pool.dtype != torch.uint8 or pool.dim() != 3:
            raise TypeError("The pool must be uint8 [num_layers, num_blocks, unit_bytes].")
        self._pool = pool
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kv-pool")
        self._stream = _side_stream(pool.device)

    @property
    def device(self) -> torch.device:
        return self._pool.device

    @property
    def num_layers(self) -> int:
        return self._pool.shape[0]

    @property
    def unit_bytes(self) -> int:
        return self._pool.shape[2]

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
        return await self._on_thread(work)

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
        return await self._on_thread(work)

    async def settle(self) -> None:
        """Wait until every device operation of this process on slots and blocks has ended."""
        if self._stream is not None:
            await self._on_thread(functools.partial(torch.cuda.synchronize, self.device))

    def close(self) -> None:
        self._thread.shutdown(wait=True)

    async def _on_thread(self, work: Callable[[], T]) -> T:
        """A move cannot be stopped half-way: a cancelled caller still waits for its end."""
        moving = asyncio.get_running_loop().run_in_executor(self._thread, work)
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
            pack_blocks(self._pool, layer_start, num_layers, self._ids(block_ids), out)
            return _as_array(block_digests(front, num_units), num_layers)
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            pack_blocks(self._pool, layer_start, num_layers, self._ids(block_ids), out)
            digests = block_digests(front, num_units).to("cpu", non_blocking=True)
            self._wait_for_device()
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
            unpack_blocks(src, self._pool, layer_start, num_layers, self._ids(block_ids))
            return True
        with torch.cuda.stream(self._stream):
            digests = block_digests(front, num_units).to("cpu", non_blocking=True)
            unpack_blocks(src, self._pool, layer_start, num_layers, self._ids(block_ids))
            self._wait_for_device()
        return accepts(_as_array(digests, num_layers))

    def _ids(self, block_ids: Sequence[int]) -> torch.Tensor:
        ids = torch.tensor(block_ids, dtype=torch.int64)
        if self._stream is None:
            return ids
        return ids.pin_memory().to(self.device, non_blocking=True)

    def _wait_for_device(self) -> None:
        """Sleep, not spin, until what was queued on the side stream is done."""
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record(self._stream)
        done.synchronize()


def _side_stream(device: torch.device) -> torch.cuda.Stream | None:
    if device.type != "cuda":
        return None
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _as_array(digests: torch.Tensor, num_layers: int) -> NDArray[np.uint64]:
    """int64 `[num_units]` in host memory -> uint64 `[num_layers, num_blocks]`."""
    return digests.numpy().view(np.uint64).reshape(num_layers, -1)
