"""Moves whole blocks between the KV pool and host memory, beside the steps.

    pool  one for each rank: uint8 [num_layers, num_blocks, unit_bytes]
    host  uint8 [num_slots, block_bytes], pinned: a block is one run of bytes, over all layers and
          heads, so that it takes one copy over the bus and not one for each layer

Life of a copy
    1. `start` hands it to the thread of its direction; a save and a load run at the same time, as
       the bus carries both ways at once.
    2. On a GPU it is cut into pieces of the size of a lane. A kernel packs the blocks of a piece
       into the lane's buffer, another takes their digests, and each run of slots that lie side
       by side is one copy. Two lanes take turns, so the bus never waits for a kernel. A load goes
       the other way; what it writes belongs to it alone until its digests are judged.
    3. `done` gets the digests, or None when anything went wrong, on the thread of the copy. If not
       even what was begun can be waited for, the device is lost: who watches ends the node, and the
       blocks and slots stay with the copy, whatever still writes there.

Nothing here orders a copy behind a step: what is saved was collected before, what is loaded is
used by steps that are launched later, and all of these blocks are held meanwhile.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import torch

from cluster.errors import device_lost
from cluster.isolation import isolated, tried
from engine.block_copies import CopyKind
from engine.host_memory import HostMemory
from engine.loop_errors import unawaited
from kernels.block_digest import block_digests
from kernels.copy_blocks import pack_whole_blocks, unpack_whole_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from engine.block_copies import BlockCopy
    from engine.host_blocks import HostBlocks

    Call = Callable[[Callable[[], None]], Future[None]]
    Done = Callable[[list[int] | None], None]

logger = logging.getLogger(__name__)
LANE_BYTES = 16 << 20
NUM_LANES = 2  # for each direction
_WEIGHT = 0.3  # of the newest rate


def device_bytes(block_bytes: int) -> int:
    """Memory of the device that a copier takes beside the pool."""
    lanes = len(CopyKind) * NUM_LANES
    return lanes * max(LANE_BYTES, block_bytes)


@dataclass(slots=True)
class CopyStats:
    """Of one direction. Written by its thread. `bytes_per_second` follows what was last."""

    num_bytes: int = 0
    seconds: float = 0.0
    bytes_per_second: float = 0.0

    def count(self, num_bytes: int, seconds: float) -> None:
        self.num_bytes += num_bytes
        self.seconds += seconds
        if num_bytes > 0 and seconds > 0:
            rate, before = num_bytes / seconds, self.bytes_per_second
            self.bytes_per_second = before + _WEIGHT * (rate - before) if before else rate


class HostCopier:
    """Owns the memory of the slots, the lanes and the threads. `close` waits for copies that
    run."""

    def __init__(self, pools: Sequence[torch.Tensor], num_slots: int) -> None:
        """Raises `ConfigError` if there is no memory for the slots."""
        self._pools = tuple(pools)
        self.device = pools[0].device
        num_layers, _, part_bytes = pools[0].shape
        self._block_shape = (num_layers, part_bytes * len(pools))
        self.block_bytes = num_layers * part_bytes * len(pools)
        self.stats = {kind: CopyStats() for kind in CopyKind}
        self._memory = HostMemory(num_slots, self.block_bytes, self.device)
        self._threads = {kind: ThreadPoolExecutor(1, f"kv-{kind.value}") for kind in CopyKind}
        self._lanes: dict[CopyKind, tuple[_Lane, ...]] = {}
        self._notes: dict[CopyKind, _Notes] = {}
        self._on_lost: Callable[[BaseException], None] = lambda error: None
        if self.device.type == "cuda":
            self._lanes = {kind: self._make_lanes() for kind in CopyKind}
            self._notes = {kind: _Notes(1024) for kind in CopyKind}
            self._warm_up()

    @property
    def slots(self) -> torch.Tensor:
        """uint8 `[num_slots, block_bytes]` in host memory."""
        return self._memory.slots

    def watch(self, on_lost: Callable[[BaseException], None]) -> None:
        """Call `on_lost`, on another thread, when a copy finds that the device is lost."""
        self._on_lost = on_lost

    def start_wanted(self, host: HostBlocks, call: Call) -> None:
        """Begin the copies that `host` asks for; by `call` it hears of their ends."""
        for copy in host.take_copies():
            self.start(copy, partial(_report, call, host, copy))

    def start(self, copy: BlockCopy, done: Done) -> None:
        """Begin a copy. `done` is called once, on another thread, unless the device is lost."""
        self._threads[copy.kind].submit(self._run, copy, done)

    def load_seconds(self, num_blocks: int) -> float:
        """How long a load of so many blocks takes, by those before; 0 before the first."""
        rate = self.stats[CopyKind.LOAD].bytes_per_second
        return num_blocks * self.block_bytes / rate if rate else 0.0

    def close(self) -> None:
        """No copy runs after this, and the memory is given back. Idempotent."""
        for thread in self._threads.values():
            thread.shutdown(wait=True)
        self._memory.free()

    def _run(self, copy: BlockCopy, done: Done) -> None:
        began = perf_counter()
        moves = self._move_here if self.device.type == "cpu" else self._move_over_the_bus
        digests = tried(partial(moves, copy.kind, copy.slots, copy.block_ids))
        if isinstance(digests, Exception):
            logger.error("a copy of KV blocks failed", exc_info=digests)
            if self._has_settled(copy.kind):
                done(None)  # its blocks are computed again
            return
        num_bytes = len(copy.block_ids) * self.block_bytes
        self.stats[copy.kind].count(num_bytes, perf_counter() - began)
        done(digests)

    def _has_settled(self, kind: CopyKind) -> bool:
        """Wait until nothing of a copy that failed writes any more. False: nobody can say that."""
        complaint = "a copy of KV blocks cannot be waited for"
        for lane in self._lanes.get(kind, ()):
            if not isolated(lane.stream.synchronize, complaint, logger):
                self._on_lost(device_lost())
                return False
        return True

    # ---- where the pool is host memory itself -----------------------------------------------

    def _move_here(
        self, kind: CopyKind, slots: Sequence[int], block_ids: Sequence[int]
    ) -> list[int]:
        digests = np.empty(len(slots), dtype=np.int64)
        order = np.argsort(slots, kind="stable")  # many lie side by side, and move at once
        for begin, end in runs([slots[i] for i in order]):
            piece = order[begin:end]
            first, size = slots[piece[0]], end - begin
            blocks = self.slots[first : first + size].view(size, *self._block_shape)
            ids = torch.tensor([block_ids[i] for i in piece])
            if kind is CopyKind.SAVE:
                self._pack(ids, blocks)
            digests[piece] = block_digests(blocks, size).numpy()
            if kind is CopyKind.LOAD:
                self._unpack(blocks, ids)
        result: list[int] = digests.tolist()
        return result

    # ---- on a GPU -----------------------------------------------------------------------------

    def _move_over_the_bus(
        self, kind: CopyKind, slots: Sequence[int], block_ids: Sequence[int]
    ) -> list[int]:
        torch.cuda.set_device(self.device)
        lanes = self._lanes[kind]
        order = np.argsort(slots, kind="stable")  # so that many lie side by side
        sorted_slots = [slots[i] for i in order]
        notes = self._notes[kind] = self._notes[kind].fitting(len(slots))
        notes.ids[: len(slots)] = torch.from_numpy(np.asarray(block_ids, dtype=np.int64)[order])
        with torch.cuda.stream(lanes[0].stream):
            device_ids = notes.ids[: len(slots)].to(self.device, non_blocking=True)
            digests = torch.empty(len(slots), dtype=torch.int64, device=self.device)
            lanes[0].behind.record()
        move = self._save_piece if kind is CopyKind.SAVE else self._load_piece
        for lane in lanes[1:]:
            lane.stream.wait_event(lanes[0].behind)
        size = lanes[0].buffer.shape[0]
        for turn, begin in enumerate(range(0, len(slots), size)):
            piece = slice(begin, begin + size)
            lane = lanes[turn % len(lanes)]
            with torch.cuda.stream(lane.stream):
                digests[piece] = move(lane, sorted_slots[piece], device_ids[piece])
        return self._collect(lanes, digests, notes.digests[: len(slots)], order)

    def _collect(
        self,
        lanes: Sequence[_Lane],
        digests: torch.Tensor,
        found: torch.Tensor,
        order: np.ndarray,
    ) -> list[int]:
        """Wait for all lanes. The digests, back in the order of the copy."""
        for lane in lanes[1:]:
            lane.behind.record(lane.stream)
            lanes[0].stream.wait_event(lane.behind)
        with torch.cuda.stream(lanes[0].stream):
            found.copy_(digests, non_blocking=True)
            lanes[0].behind.record()
        lanes[0].behind.synchronize()
        ordered = np.empty(len(order), dtype=np.int64)
        ordered[order] = found.numpy()
        result: list[int] = ordered.tolist()
        return result

    def _save_piece(self, lane: _Lane, slots: Sequence[int], ids: torch.Tensor) -> torch.Tensor:
        packed = lane.buffer[: len(slots)]
        self._pack(ids, packed.view(len(slots), *self._block_shape))
        digests = block_digests(packed, len(slots))
        for begin, end in runs(slots):
            first = slots[begin]
            target = self.slots[first : first + end - begin]
            target.copy_(packed[begin:end], non_blocking=True)
        return digests

    def _load_piece(self, lane: _Lane, slots: Sequence[int], ids: torch.Tensor) -> torch.Tensor:
        packed = lane.buffer[: len(slots)]
        for begin, end in runs(slots):
            first = slots[begin]
            packed[begin:end].copy_(self.slots[first : first + end - begin], non_blocking=True)
        digests = block_digests(packed, len(slots))
        self._unpack(packed.view(len(slots), *self._block_shape), ids)
        return digests

    def _make_lanes(self) -> tuple[_Lane, ...]:
        size = max(1, LANE_BYTES // self.block_bytes)
        return tuple(_Lane(size, self.block_bytes, self.device) for _ in range(NUM_LANES))

    def _warm_up(self) -> None:
        """Compile the kernels now. Slot 0 and block 0 hold nothing yet."""
        for kind in CopyKind:
            self._move_over_the_bus(kind, [0], [0])

    def _pack(self, ids: torch.Tensor, blocks: torch.Tensor) -> None:
        for part, pool in enumerate(self._pools):
            pack_whole_blocks(pool, ids, blocks, part=part, num_parts=len(self._pools))

    def _unpack(self, blocks: torch.Tensor, ids: torch.Tensor) -> None:
        for part, pool in enumerate(self._pools):
            unpack_whole_blocks(blocks, pool, ids, part=part, num_parts=len(self._pools))


class _Notes:
    """Pinned memory for what one copy tells the device and hears from it, used again by the
    next: int64 `[size]` each."""

    __slots__ = ("digests", "ids")

    def __init__(self, size: int) -> None:
        self.ids = torch.empty(size, dtype=torch.int64, pin_memory=True)
        self.digests = torch.empty(size, dtype=torch.int64, pin_memory=True)

    def fitting(self, size: int) -> _Notes:
        """These, or larger ones."""
        return self if size <= len(self.ids) else _Notes(2 * size)


class _Lane:
    """A buffer of the device, uint8 `[blocks of a piece, block_bytes]`, and the stream that uses
    it: in its order the buffer is free again."""

    __slots__ = ("behind", "buffer", "stream")

    def __init__(self, size: int, block_bytes: int, device: torch.device) -> None:
        self.buffer = torch.empty((size, block_bytes), dtype=torch.uint8, device=device)
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.behind = torch.cuda.Event()  # type: ignore[no-untyped-call]


def runs(slots: Sequence[int]) -> list[tuple[int, int]]:
    """Where in these ascending slots stretches without a gap begin and end."""
    ends = [i for i, (a, b) in enumerate(pairwise(slots), start=1) if b != a + 1]
    return list(pairwise([0, *ends, len(slots)]))


def _report(call: Call, host: HostBlocks, copy: BlockCopy, digests: list[int] | None) -> None:
    unawaited(call(partial(host.end, copy, digests)))
