"""How a decode step's attention is dealt out on a GPU: planned once per step and sliding window.

1. Keys come in tiles. The tiles of all sequences, one sequence after the other, are one row of
   work, the same for every KV head. A sequence without keys (padding) has one tile too, so that
   somebody writes its output.
2. The row is cut into equal shares, one per program. Their number follows from the device and the
   KV's shape alone, so that a captured CUDA graph stays right whatever the lengths are.
3. For each share a small kernel writes a record: where it begins and how long it is. It runs
   inside the graph, in front of the layers; `split_attention.py` reads the records in all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kernels.dispatch import jit, jit_for_any, next_power_of_two, num_multiprocessors, tl

# Five integers and padding: a record lies in one 32-byte sector of memory.
RECORD_SIZE = 8

_RECORDS_PER_PROGRAM = 16
_SEQUENCES_AT_A_TIME = 128
_MAX_TILE = 64
# Bytes of a tile of keys; as much again for its values.
_TILE_BYTES = 16 << 10
_PROGRAMS_PER_MULTIPROCESSOR = 2


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """One step's decode attention, for every layer of one KV shape and one sliding window.

    records: int32 `[num_programs, RECORD_SIZE]`, per KV head: the sequence a share begins in, the
    tile it begins at (counted from the first that the window leaves), its number of tiles, the
    number of tiles of a full share, and the length of that sequence. tile: tokens of a tile.
    """

    records: torch.Tensor
    tile: int
    sliding_window: int | None

    @property
    def num_programs(self) -> int:
        """Programs per KV head."""
        return self.records.shape[0]


def plan_splits(
    seq_lens: torch.Tensor, kv_layer: torch.Tensor, *, sliding_window: int | None
) -> SplitPlan:
    """Plans `paged_attention` of CUDA tensors; shapes as there. Any layer's KV will do.

    seq_lens must have a row.
    """
    num_seqs, device = seq_lens.shape[0], seq_lens.device
    _, _, num_kv_heads, _, head_size = kv_layer.shape
    row_bytes = kv_layer.element_size() * next_power_of_two(head_size)
    tile = max(16, min(_MAX_TILE, _TILE_BYTES // row_bytes))
    num_programs = _PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors(device) // num_kv_heads
    num_programs = max(1, num_programs)
    records = torch.empty((num_programs, RECORD_SIZE), dtype=torch.int32, device=device)
    _plan_kernel[(-(-num_programs // _RECORDS_PER_PROGRAM),)](
        seq_lens, records, num_seqs, num_programs,
        TILE=tile, WINDOW=sliding_window or 0, RECORDS=_RECORDS_PER_PROGRAM,
        SEQUENCES=_SEQUENCES_AT_A_TIME, RECORD_SIZE=RECORD_SIZE, num_warps=4,
    )  # fmt: skip
    return SplitPlan(records, tile, sliding_window)


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
    lens_ptr: tl.tensor, records_ptr: tl.tensor, num_seqs: tl.tensor, num_programs: tl.tensor,
    TILE: tl.constexpr, WINDOW: tl.constexpr, RECORDS: tl.constexpr, SEQUENCES: tl.constexpr,
    RECORD_SIZE: tl.constexpr,
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
        is_before = (ends[None, :] <= start[:, None]) & (begin + lane < num_seqs)[None, :]
        sequence += tl.sum(is_before.to(tl.int32), axis=1)
        end = tl.maximum(end, tl.max(tl.where(is_before, ends[None, :], 0), axis=1))
        offset += tl.sum(tiles, axis=0)
    num_tiles = tl.maximum(tl.minimum(total - start, share), 0)
    is_record = program < num_programs
    seq_len = tl.load(lens_ptr + sequence, mask=is_record & (num_tiles > 0), other=0)
    record = records_ptr + program * RECORD_SIZE
    tl.store(record, sequence, mask=is_record)
    tl.store(record + 1, start - end, mask=is_record)
    tl.store(record + 2, num_tiles, mask=is_record)
    tl.store(record + 3, share + program * 0, mask=is_record)
    tl.store(record + 4, seq_len, mask=is_record)
