"""Adds up the parts of sequences that `split_attention` has cut, in the order of the shares."""

from __future__ import annotations

from typing import Any

from kernels.decode_plan import load_record, tile_range
from kernels.dispatch import gdc_launch_dependents, gdc_wait, jit, jit_for_any, tl


@jit
def _find_cut(
    lens_ptr: tl.tensor, records_ptr: tl.tensor, origins_ptr: tl.tensor, number: tl.tensor,
    TILE: tl.constexpr, WINDOW: tl.constexpr, RECORD_SIZE: tl.constexpr, BY_SEQUENCE: tl.constexpr,
) -> Any:  # fmt: skip
    """A sequence that may be cut, its first and its last share: where these differ it is.

    BY_SEQUENCE: `number` is the sequence. Else it is a share: the sequence is the one that begins
    there and goes on in the next one.
    """
    if BY_SEQUENCE:
        sequence, seq_len = number, tl.load(lens_ptr + number)
        origin, share = tl.load(origins_ptr + number), tl.load(records_ptr + 3)
        first = origin // share
    else:
        sequence, tile, left, share, seq_len = load_record(records_ptr, number + 1, RECORD_SIZE)
        origin = (number + 1) * share - tile
        goes_on = (left > 0) & (tile > 0) & (tile <= share)
        first = tl.where(goes_on, number, 1 << 30)
    _, tiles = tile_range(seq_len, TILE, WINDOW)
    return sequence, first, (origin + tiles - 1) // tl.maximum(share, 1)


@jit_for_any("num_programs")
def combine_kernel(
    lens_ptr: tl.tensor, records_ptr: tl.tensor, origins_ptr: tl.tensor, parts_ptr: tl.tensor,
    logs_ptr: tl.tensor, out_ptr: tl.tensor, num_programs: tl.tensor,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_DIM: tl.constexpr,
    TILE: tl.constexpr, WINDOW: tl.constexpr, PARTS: tl.constexpr, RECORD_SIZE: tl.constexpr,
    BY_SEQUENCE: tl.constexpr, CHAINED: tl.constexpr,
) -> None:  # fmt: skip
    """A query head of a sequence, if it was cut."""
    if CHAINED:
        gdc_launch_dependents()
    head = tl.program_id(0)
    sequence, first, last = _find_cut(
        lens_ptr, records_ptr, origins_ptr, tl.program_id(1), TILE, WINDOW, RECORD_SIZE, BY_SEQUENCE
    )
    if CHAINED:
        gdc_wait()
    if first < last:
        column, lane = tl.arange(0, BLOCK_DIM), tl.arange(0, PARTS)
        is_column = column < HEAD_SIZE
        peak, total = tl.full([1], float("-inf"), tl.float32), tl.zeros([1], tl.float32)
        result = tl.zeros([BLOCK_DIM], tl.float32)
        for begin in range(first, last + 1, PARTS):
            program = begin + lane
            slot = 2 * (head // GROUP * num_programs + program) + (program == first).to(tl.int32)
            part = slot * GROUP + head % GROUP
            is_part = program <= last
            log = tl.load(logs_ptr + part, mask=is_part, other=float("-inf"))
            part_ptrs = parts_ptr + part[:, None] * HEAD_SIZE + column[None, :]
            values = tl.load(part_ptrs, mask=is_part[:, None] & is_column[None, :], other=0.0)
            new_peak = tl.maximum(peak, tl.max(log, axis=0))
            weights, decay = tl.exp2(log - new_peak), tl.exp2(peak - new_peak)
            total = total * decay + tl.sum(weights, axis=0)
            result = result * decay + tl.sum(values * weights[:, None], axis=0)
            peak = new_peak
        out_ptrs = out_ptr + (sequence.to(tl.int64) * (KV_HEADS * GROUP) + head) * HEAD_SIZE
        result = (result / total).to(out_ptr.dtype.element_ty)
        tl.store(out_ptrs + column, result, mask=is_column)
