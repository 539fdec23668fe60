"""Moves between the paged pool and slots on a CUDA device.

Life of a move
    1. Queued on one side stream, ahead of the model's kernels: one pass that copies and takes
       digests, the digests' way to pinned memory, an event. The ids of the same blocks are sent to
       the device once: layers of a prompt differ in nothing else.
    2. The event loop asks for the event (`polling.py`). No thread waits, none is woken.
    3. The notes, which hold all memory of a move, serve the next one.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from kernels.copy_and_digest import pack_and_digest, unpack_and_digest
from kv_transfer.digests import DigestKind
from kv_transfer.polling import EventQueue
from kv_transfer.protocol import MAX_UNITS_PER_FRAME

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from kv_transfer.frame_units import FrameUnits

T = TypeVar("T")
_KEPT_IDS = 64  # lists of block ids that stay on the device


class DeviceMoves:
    """Of one process. `pools`: the parts of the pool, one for each rank of the model."""

    def __init__(self, pools: Sequence[torch.Tensor], takes_digests: bool) -> None:
        self._pools = pools
        self._takes_digests = takes_digests
        self._device = pools[0].device
        # A move is short, and somebody waits for it.
        self._stream = torch.cuda.Stream(self._device, priority=-1)  # type: ignore[no-untyped-call]
        self._others = torch.cuda.current_stream(self._device)
        self._ids: OrderedDict[tuple[int, ...], torch.Tensor] = OrderedDict()
        self._notes: deque[_Notes] = deque()
        self._ends = EventQueue()
        self._warm_up()

    @property
    def digest_kinds(self) -> tuple[DigestKind, ...]:
        return (DigestKind.MULTIPLY_SHIFT,)

    def gather(
        self, frame: FrameUnits, after: torch.Event | None
    ) -> asyncio.Future[NDArray[np.uint64]]:
        """The digests of what was packed into the frame once `after` had happened."""
        with self._on_stream():
            if after is not None:
                self._stream.wait_event(after)
            notes, ids, digests = self._prepare(frame)
            pack_and_digest(
                self._pools, frame.layer_start, frame.num_layers, ids, frame.units, digests
            )
            self._queue_end(notes, digests)
        return self._end(notes, frame, ids, lambda found: found)

    def scatter(
        self, frame: FrameUnits, accepts: Callable[[NDArray[np.uint64]], bool]
    ) -> asyncio.Future[bool]:
        """What `accepts` says of the digests of the frame that was put into blocks."""
        with self._on_stream():
            notes, ids, digests = self._prepare(frame)
            unpack_and_digest(
                frame.units, self._pools, frame.layer_start, frame.num_layers, ids, digests
            )
            self._queue_end(notes, digests)
        accepts = accepts if self._takes_digests else lambda _: True
        return self._end(notes, frame, ids, accepts)

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        """As `torch.cuda.stream`, which asks for the current stream and device each time."""
        torch.cuda.set_stream(self._stream)
        try:
            yield
        finally:
            torch.cuda.set_stream(self._others)

    def _prepare(self, frame: FrameUnits) -> tuple[_Notes, torch.Tensor, torch.Tensor | None]:
        notes = self._notes.pop() if self._notes else _Notes(self._device)
        digests = notes.device_digests[: frame.num_units] if self._takes_digests else None
        return notes, self._ids_of(frame), digests

    def _ids_of(self, frame: FrameUnits) -> torch.Tensor:
        """On the device. All moves share a stream: who finds them there comes after the copy."""
        block_ids = tuple(frame.block_ids)
        ids = self._ids.get(block_ids)
        if ids is None:
            pinned = torch.from_numpy(np.array(block_ids, dtype=np.int64)).pin_memory()
            ids = pinned.to(self._device, non_blocking=True)
            while len(self._ids) >= _KEPT_IDS:
                self._ids.popitem(last=False)
            self._ids[block_ids] = ids
        return ids

    def _queue_end(self, notes: _Notes, digests: torch.Tensor | None) -> None:
        if digests is not None:
            notes.digests[: digests.numel()].copy_(digests, non_blocking=True)
        notes.done.record(self._stream)
        if digests is not None:
            digests.zero_()

    def _end(
        self,
        notes: _Notes,
        frame: FrameUnits,
        ids: torch.Tensor,
        finish: Callable[[NDArray[np.uint64]], T],
    ) -> asyncio.Future[T]:
        ended: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def end(done: asyncio.Future[None]) -> None:
            nonlocal ids
            del ids  # the device has read them
            error = done.exception()
            if error is not None:
                ended.set_exception(error)
                return
            digests = notes.digests[: frame.num_units].numpy().copy()
            self._notes.append(notes)
            try:
                ended.set_result(finish(digests.view(np.uint64).reshape(frame.num_layers, -1)))
            except Exception as problem:
                ended.set_exception(problem)

        self._ends.when(notes.done, is_urgent=True).add_done_callback(end)
        return ended

    def _warm_up(self) -> None:
        """Compile the kernels now: the first move must not stop the event loop."""
        unit_bytes = self._pools[0].shape[2] * len(self._pools)
        packed = torch.empty((1, 1, unit_bytes), dtype=torch.uint8, device=self._device)
        ids = torch.zeros(1, dtype=torch.int64, device=self._device)
        digests = torch.zeros(1, dtype=torch.int64, device=self._device)
        pack_and_digest(self._pools, 0, 1, ids, packed, digests)
        unpack_and_digest(packed, self._pools, 0, 1, ids, digests)
        torch.cuda.synchronize(self._device)


class _Notes:
    """What one move needs beside its slot. Used again: to make them takes longer than most moves.
    `device_digests` are zero between two moves."""

    __slots__ = ("device_digests", "digests", "done")

    def __init__(self, device: torch.device) -> None:
        num = MAX_UNITS_PER_FRAME
        self.device_digests = torch.zeros(num, dtype=torch.int64, device=device)
        self.digests = torch.zeros(num, dtype=torch.int64, pin_memory=True)
        self.done = torch.cuda.Event()  # type: ignore[no-untyped-call]
