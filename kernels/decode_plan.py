"""How a decode step's attention is dealt out on a GPU: planned once per step and sliding window.

1. Keys come in tiles. The tiles of all sequences, one sequence after the other, are one row of
   work, the same for every KV head. A sequence without keys (padding) has one tile too, so that
   somebody writes its output.
2. The row is cut into equal shares, one per program. Their number follows from the device and the
   KV's shape alone, so that a captured CUDA graph stays right whatever the lengths are.
3. For each share a small kernel writes a record: where it begins and how long it is. It runs
   inside the graph, in front of the layers; `split_attention.py` reads the records in all of them.
4. The kernel takes no part in chained launches (`dispatch.chained_launch`): what is launched after
   it starts when it has ended. So whatever comes after may read the plan, the lengths and the
   block tables, which were there before it, without waiting for the kernel in front.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from kernels.dispatch import jit, jit_for_any, next_power_of_two, num_multiprocessors, tl

# Five integers and padding: a record lies in one 32-byte sector of memory.
RECORD_SIZE = 8

_RECORDS_PER_PROGRAM = 16
_SEQUENCES_AT_A_TIME = 128


class SplitShape(NamedTuple):
    """tile: tokens of a tile. programs: those of all KV heads, per multiprocessor."""

    tile: int
    programs: int
    num_warps: int
    num_stages: int


def split_shape(kv_layer: torch.Tensor) -> SplitShape:
    """What reads such KV fastest on an H200: 132 multiprocessors with 227 KiB of shared memory.

    A tile's keys are at most 16 KiB. Few warps wait for each other less often; while those of one
    program do, the other programs' loads are on their way. As many programs as here fit on a
    multiprocessor, no more: otherwise those that are launched while the kernel in front still ends
    crowd on some of them.
    """
    itemsize, head_size = kv_layer.element_size(), kv_layer.shape[4]
    tile = max(16, min(64, (16 << 10) // (itemsize * next_power_of_two(head_size))))
    if head_size <= 128 and itemsize <= 2:
        num_stages = 2 if itemsize * head_size > 128 else 3
        return SplitShape(tile, programs=4, num_warps=2, num_stages=num_stages)
    return SplitShape(tile, programs=2, num_warps=8 if itemsize == 4 else 4, num_stages=3)


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """One step's decode attention, for every layer of one KV shape and one sliding window.

    records: int32 `[num_programs, RECORD_SIZE]`, per KV head: the sequence a share begins in, the
    tile it begins at (counted from the first that the window leaves), its number of tiles, the
    number of tiles of a full share, and the length of that sequence. origins: int32 `[num_seqs]`,
    where each sequence begins in the row of all tiles.
    """

    records: torch.Tensor
    origins: torch.Tensor
    shape: SplitShape
    sliding_window: int | None

    @property
    def num_programs(self) -> int:
        """Programs per KV head."""
        return self.records.shape[0]


def plan_splits(
    seq_lens: torch.Tensor, kv_layer: torch.Tensor, *, sliding_window: int | None
) -> SplitPlan:
    """Plans `paged_attention` of CUDA tensors; shapes as there. Any layer's KV will do."""
    num_seqs, device = seq_lens.shape[0], seq_lens.device
    shape = split_shape(kv_layer)
    num_programs = max(1, shape.programs * num_multiprocessors(device) // kv_layer.shape[2])
    records = torch.empty((num_programs, RECORD_SIZE), dtype=torch.int32, device=device)
    origins = torch.empty_like(seq_lens)
    _plan_kernel[(-(-num_programs // _RECORDS_PER_PROGRAM),)](
        seq_lens, records, origins, num_seqs, num_programs,
        TILE=shape.tile, WINDOW=sliding_window or 0, RECORDS=_RECORDS_PER_PROGRAM,
        SEQUENCES=_SEQUENCES_AT_A_TIME, RECORD_SIZE=RECORD_SIZE, num_warps=4,
    )  # fmt: skip
    return SplitPlan(records, origins, shape, sliding_window)


@jit
def tile_range(seq_len: tl.tensor, TILE: tl.constexpr, WINDOW: tl.constexpr) -> Any:
    """First tile that the window leaves, and how many there are from it on: at least one."""
    first = seq_len * 0
    if WINDOW > 0:
        first = tl.maximum(seq_len - WINDOW, 0) // TILE
    return first, tl.maximum((seq_len + TILE - 1) // TILE - first, 1)


@jit
def load_record(records_ptr: tl.tensor, program: tl.tensor, RECORD_SIZE: tl.constexpr) -> Any:
    """Sequence, tile, number of tiles, tiles of a full share, length of the sequence."""
    record = records_ptr + program * RECORD_SIZE
    sequence, tile, num_tiles = tl.load(record), tl.load(record + 1), tl.load(record + 2)
    return sequence, tile, num_tiles, tl.load(record + 3), tl.load(record + 4)


@jit
def _num_tiles(
    lens_ptr: tl.tensor, row: tl.tensor, num_seqs: tl.tensor, TILE: tl.constexpr,
    WINDOW: tl.constexpr,
) -> Any:  # fmt: skip
    """Tiles of each row; none behind the last."""
    seq_len = tl.load(lens_ptr + row, mask=row < num_seqs, other=0)
    _, tiles = tile_range(seq_len, TILE, WINDOW)
    return tl.where(row < num_seqs, tiles, 0)


@jit_for_any("num_seqs", "num_programs")
def _plan_kernel(
    lens_ptr: tl.tensor, records_ptr: tl.tensor, origins_ptr: tl.tensor, num_seqs: tl.tensor,
    num_programs: tl.tensor, TILE: tl.constexpr, WINDOW: tl.constexpr, RECORDS: tl.constexpr,
    SEQUENCES: tl.constexpr, RECORD_SIZE: tl.constexpr,
) -> None:  # fmt: skip
    lane = tl.arange(0, SEQUENCES)
    counts = tl.zeros([SEQUENCES], tl.int32)
    for begin in range(0, num_seqs, SEQUENCES):
        counts += _num_tiles(lens_ptr, begin + lane, num_seqs, TILE, WINDOW)
    total = tl.sum(counts, axis=0)
    share = tl.cdiv(total, num_programs)
    program = tl.program_id(0) * RECORDS + tl.arange(0, RECORDS)
    start = program * share
    # How many sequences end at or before a share's start, and where the last of them ends.
    sequence, end = tl.zeros([RECORDS], tl.int32), tl.zeros([RECORDS], tl.int32)
    offset = total * 0
    for begin in range(0, num_seqs, SEQUENCES):
        tiles = _num_tiles(lens_ptr, begin + lane, num_seqs, TILE, WINDOW)
        ends = offset + tl.cumsum(tiles, axis=0)
        is_sequence = begin + lane < num_seqs
        if tl.program_id(0) == 0:
            tl.store(origins_ptr + begin + lane, ends - tiles, mask=is_sequence)
        is_before = (ends[None, :] <= start[:, None]) & is_sequence[None, :]
        sequence += tl.sum(is_before.to(tl.int32), axis=1)
        end = tl.maximum(end, tl.max(tl.where(is_before, ends[None, :], 0), axis=1))
        offset += tl.sum(tiles, axis=0)
    num_tiles = tl.maximum(tl.minimum(total - start, share), 0)
    is_record = program < num_programs
    seq_len = tl.load(lens_ptr + sequence, mask=is_record & (num_tiles > 0), other=0)
    record = records_ptr + program * RECORD_SIZE
    tl.store(record, tl.where(num_tiles > 0, sequence, 0), mask=is_record)
    tl.store(record + 1, start - end, mask=is_record)
    tl.store(record + 2, num_tiles, mask=is_record)
    tl.store(record + 3, share + program * 0, mask=is_record)
    tl.store(record + 4, seq_len, mask=is_record)
