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
from collections import deque
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from kernels.copy_and_digest import pack_and_digest, unpack_and_digest
from kv_transfer.digests import DigestKind
from kv_transfer.polling import EventQueue
from kv_transfer.protocol import MAX_UNITS_PER_FRAME

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from kv_transfer.frame_place import FramePlace


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
        self._ids: dict[tuple[int, ...], _Ids] = {}  # the oldest first
        self._notes: deque[_Notes] = deque()
        self._ends = EventQueue()
        self._warm_up()

    @property
    def digest_kinds(self) -> tuple[DigestKind, ...]:
        return (DigestKind.MULTIPLY_SHIFT,)

    def gather(
        self, slot: torch.Tensor, frame: FramePlace, after: torch.Event | None
    ) -> asyncio.Future[NDArray[np.uint64]]:
        """The digests of what was packed into the slot once `after` had happened."""
        torch.cuda.set_stream(self._stream)
        try:
            if after is not None:
                self._stream.wait_event(after)
            notes, ids = self._take_notes(), self._ids_of(frame.block_ids)
            pack_and_digest(
                self._pools, frame.layer_start, frame.num_layers, ids, len(frame.block_ids),
                slot, notes.device_digests if self._takes_digests else None,
            )  # fmt: skip
            self._queue_end(notes, frame)
        finally:
            torch.cuda.set_stream(self._others)
        return self._end(notes, frame, lambda found: found)

    def scatter(
        self,
        slot: torch.Tensor,
        frame: FramePlace,
        accepts: Callable[[NDArray[np.uint64]], bool],
    ) -> asyncio.Future[bool]:
        """What `accepts` says of the digests of the frame that was put into blocks."""
        torch.cuda.set_stream(self._stream)
        try:
            notes, ids = self._take_notes(), self._ids_of(frame.block_ids)
            unpack_and_digest(
                slot, self._pools, frame.layer_start, frame.num_layers, ids, len(frame.block_ids),
                notes.device_digests if self._takes_digests else None,
            )  # fmt: skip
            self._queue_end(notes, frame)
        finally:
            torch.cuda.set_stream(self._others)
        return self._end(notes, frame, accepts if self._takes_digests else lambda _: True)

    def _take_notes(self) -> _Notes:
        return self._notes.pop() if self._notes else _Notes(self._device)

    def _ids_of(self, block_ids: tuple[int, ...]) -> torch.Tensor:
        """On the device. All moves share a stream: who finds them there comes after the copy, and
        the memory of a list that is put out is written anew behind all who read it."""
        ids = self._ids.get(block_ids)
        if ids is None:
            if len(self._ids) < _KEPT_IDS:
                ids = _Ids(self._device)
            else:
                ids = self._ids.pop(next(iter(self._ids)))
            ids.fill(block_ids)
            self._ids[block_ids] = ids
        return ids.on_device

    def _queue_end(self, notes: _Notes, frame: FramePlace) -> None:
        if not self._takes_digests:
            notes.done.record(self._stream)
            return
        found = notes.device_digests[: frame.num_units]
        notes.digests[: frame.num_units].copy_(found, non_blocking=True)
        notes.done.record(self._stream)
        found.zero_()

    def _end(
        self, notes: _Notes, frame: FramePlace, finish: Callable[[NDArray[np.uint64]], T]
    ) -> asyncio.Future[T]:
        ended: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def end(error: Exception | None) -> None:
            if ended.done():
                return
            if error is not None:
                ended.set_exception(error)
                return
            digests = notes.digests_view[: frame.num_units].copy()
            self._notes.append(notes)
            try:
                ended.set_result(finish(digests.reshape(frame.num_layers, -1)))
            except Exception as problem:
                ended.set_exception(problem)

        self._ends.when(notes.done, end, is_urgent=True)
        return ended

    def _warm_up(self) -> None:
        """Compile the kernels now: the first move must not stop the event loop."""
        unit_bytes = self._pools[0].shape[2] * len(self._pools)
        packed = torch.empty(unit_bytes, dtype=torch.uint8, device=self._device)
        ids = torch.zeros(1, dtype=torch.int64, device=self._device)
        digests = torch.zeros(1, dtype=torch.int64, device=self._device)
        pack_and_digest(self._pools, 0, 1, ids, 1, packed, digests)
        unpack_and_digest(packed, self._pools, 0, 1, ids, 1, digests)
        torch.cuda.synchronize(self._device)


class _Notes:
    """What one move needs beside its slot. Used again: to make them takes longer than most moves.
    `device_digests` are zero between two moves."""

    __slots__ = ("device_digests", "digests", "digests_view", "done")

    def __init__(self, device: torch.device) -> None:
        num = MAX_UNITS_PER_FRAME
        self.device_digests = torch.zeros(num, dtype=torch.int64, device=device)
        self.digests = torch.zeros(num, dtype=torch.int64, pin_memory=True)
        self.digests_view = self.digests.numpy().view(np.uint64)
        self.done = torch.cuda.Event()  # type: ignore[no-untyped-call]


class _Ids:
    """A list of block ids on the device, and the pinned memory that it comes from."""

    __slots__ = ("_copied", "_pinned", "_view", "on_device")

    def __init__(self, device: torch.device) -> None:
        self._pinned = torch.empty(MAX_UNITS_PER_FRAME, dtype=torch.int64, pin_memory=True)
        self._view = self._pinned.numpy()
        self.on_device = torch.empty(MAX_UNITS_PER_FRAME, dtype=torch.int64, device=device)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def fill(self, block_ids: tuple[int, ...]) -> None:
        self._copied.synchronize()  # of the list before, long ago
        num_ids = len(block_ids)
        self._view[:num_ids] = block_ids
        self.on_device[:num_ids].copy_(self._pinned[:num_ids], non_blocking=True)
        self._copied.record()
