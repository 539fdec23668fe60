"""Moves between the paged pool and slots on a CUDA device.

Life of a move
    1. Queued on a side stream, ahead of the model's kernels: one kernel that copies, takes digests,
       and seals them behind the units of a slot or compares them with what is there, and an event.
       Frames are read on two streams in turn: while the last programs of one compare, those of the
       next fetch. Where something is decoded meanwhile it is one stream: two frames at once would
       take twice the room from the model's kernels. The ids of the same blocks are sent to the
       device once: layers of a prompt differ in nothing else.
    2. The event loop asks for the event (`polling.py`). No thread waits, none is woken. Of the
       digests the host sees the verdict.
    3. The notes, which hold all memory of a move, serve the next one.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch

from kernels.kept_moves import KeptMoves
from kernels.seal_digests import Places, Sums, Verdict
from kv_transfer.device_lists import NUM_KEPT, DeviceLists
from kv_transfer.digests import DigestKind, PlaceSeal, digest_seed
from kv_transfer.frame_place import FramePlace
from kv_transfer.polling import EventQueue
from kv_transfer.protocol import MAX_UNITS_PER_FRAME

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


T = TypeVar("T")


class DeviceMoves:
    """Of one process. `pools`: the parts of the pool, one for each rank of the model."""

    def __init__(
        self,
        pools: Sequence[torch.Tensor],
        takes_digests: bool,
        *,
        num_lists: int = NUM_KEPT,
    ) -> None:
        """`num_lists`: of block ids and of positions, that stay on the device."""
        self._takes_digests = takes_digests
        self._device = pools[0].device
        # A move is short, and somebody waits for it.
        self._stream, self._second = (
            torch.cuda.Stream(self._device, priority=-1)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        self._reading = itertools.cycle((self._stream, self._second))
        self._others = torch.cuda.current_stream(self._device)
        self._unit_bytes = pools[0].shape[2] * len(pools)
        self._lists = DeviceLists(self._device, MAX_UNITS_PER_FRAME, num_lists)
        self._ascending = torch.arange(MAX_UNITS_PER_FRAME, device=self._device)
        self._notes: deque[_Notes] = deque()
        self._ends = EventQueue()
        self._kernels = KeptMoves(pools)
        self._warm_up()

    @property
    def digest_kinds(self) -> tuple[DigestKind, ...]:
        return (DigestKind.MULTIPLY_SHIFT,)

    def gather(
        self, slot: torch.Tensor, frame: FramePlace, after: torch.Event | None
    ) -> asyncio.Future[None]:
        """Units and sealed digests are in the slot, once `after` had happened."""
        if after is not None:
            self._stream.wait_event(after)
        notes = self._take_notes()
        self._kernels.pack(self._stream, slot, *self._blocks_of(frame), self._sums_of(notes))
        notes.done.record(self._stream)
        return self._end(notes, lambda: None)

    def scatter(
        self, slot: torch.Tensor, frame: FramePlace, *, is_decoding: bool = False
    ) -> asyncio.Future[bool]:
        """Whether the digests of what was put into blocks are those behind it."""
        notes, stream = self._take_notes(), self._stream if is_decoding else next(self._reading)
        notes.verdict.reset()
        num_right, sums = notes.verdict.num_right, self._sums_of(notes)
        self._kernels.unpack(stream, slot, *self._blocks_of(frame), sums, num_right)
        notes.done.record(stream)
        if not self._takes_digests:
            return self._end(notes, lambda: True)
        return self._end(notes, lambda: notes.verdict.has_verified(frame.num_units))

    def _sums_of(self, notes: _Notes) -> Sums | None:
        return notes.sums if self._takes_digests else None

    def prepare(self, table: tuple[int, ...]) -> None:
        """Frames of these blocks will come, and name it."""
        if len(table) <= MAX_UNITS_PER_FRAME:
            self._list_of(table)

    def _blocks_of(self, frame: FramePlace) -> tuple[torch.Tensor, Places]:
        """Which blocks, and their places."""
        seal, table, num = frame.seal, frame.table, len(frame.block_ids)
        if table is not None and len(table) <= MAX_UNITS_PER_FRAME and frame.is_stretch:
            ids, positions, first = self._list_of(table), self._ascending, seal.positions[0]
        else:
            ids, first = self._list_of(frame.block_ids), 0
            positions = self._list_of(seal.positions)
        return ids, Places(seal.seed, seal.layer_start, seal.num_layers, positions, num, first)

    def _list_of(self, numbers: tuple[int, ...]) -> torch.Tensor:
        """On the device, for kernels that follow on a side stream."""
        recent = self._lists.recent(numbers)
        if recent is not None:
            return recent
        with self._on_side_stream():
            return self._lists.get(numbers)

    def _take_notes(self) -> _Notes:
        if self._notes:
            return self._notes.pop()
        with self._on_side_stream():  # which fills them with zeros
            return _Notes(self._device)

    @contextmanager
    def _on_side_stream(self) -> Iterator[None]:
        """For memory that both streams use: behind its last readers, before its next. Seldom: to
        set a stream takes as long as to launch a kernel."""
        self._stream.wait_stream(self._second)
        torch.cuda.set_stream(self._stream)
        try:
            yield
        finally:
            torch.cuda.set_stream(self._others)
            self._second.wait_stream(self._stream)

    def _end(self, notes: _Notes, finish: Callable[[], T]) -> asyncio.Future[T]:
        ended: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def end(error: Exception | None) -> None:
            if ended.done():
                return
            if error is not None:
                ended.set_exception(error)
                return
            ended.set_result(finish())
            self._notes.append(notes)

        self._ends.when(notes.done, end, is_urgent=True)
        return ended

    def _warm_up(self) -> None:
        """Compile the kernels now: the first move must not stop the event loop."""
        slot = torch.empty(self._unit_bytes + 8, dtype=torch.uint8, device=self._device)
        frame = FramePlace(PlaceSeal(digest_seed(b"", b""), 0, 1, (0,)), (0,))
        notes, blocks = self._take_notes(), self._blocks_of(frame)
        sums = self._sums_of(notes)
        self._kernels.pack(self._stream, slot, *blocks, sums)
        self._kernels.unpack(self._stream, slot, *blocks, sums, notes.verdict.num_right)
        torch.cuda.synchronize(self._device)
        self._notes.append(notes)


class _Notes:
    """What one move needs beside its slot. Used again: to make them takes longer than most
    moves."""

    __slots__ = ("done", "sums", "verdict")

    def __init__(self, device: torch.device) -> None:
        self.sums = Sums(MAX_UNITS_PER_FRAME, device)
        self.verdict = Verdict(is_pinned=device.type == "cuda")
        self.done = torch.cuda.Event()  # type: ignore[no-untyped-call]
