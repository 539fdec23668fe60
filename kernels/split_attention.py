"""Decode attention on a GPU: shares of equal length of all sequences' keys, then their sum.

1. The grid is (KV heads, shares of the plan): one program per share, all of them resident at once.
   A program walks its share from sequence to sequence. Every key and value is read once for all
   query heads of the KV head. These are the columns of the matrix products, keys and the values'
   columns are the rows: tensor cores take columns by 8, but rows by 16.
2. Blocks are looked up a tile ahead, so that reading keys and values waits for no table.
3. A sequence inside one share is written to the output. Of a sequence that is cut, each program
   writes its part, normalised, and the base-2 logarithm of the part's sum of weights: into slot
   `2 * share + 1` if the sequence begins there, else into slot `2 * share`.
4. A second kernel adds up the parts of each cut sequence, in the order of the shares: results do
   not depend on which program was the first to end.

Keys and values in float8 are read as pairs: a 16-bit element is two columns of the head. Tensor
cores' operands are made from them without moving bytes between threads: the even and the odd
columns go through products of their own, in float16, which holds every float8 value. The key's
scale is part of the query, the value's is applied at the end.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from kernels.combine_parts import combine_kernel
from kernels.decode_plan import RECORD_SIZE, load_record, tile_range
from kernels.decode_tiles import load_kv, load_query, prefetch
from kernels.dispatch import (
    chained_launch,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    jit_for_any,
    next_power_of_two,
    tl,
)

if TYPE_CHECKING:
    from kernels.decode_plan import SplitPlan

# Tensor cores take no fewer columns; smaller groups of query heads are padded.
_MIN_QUERIES = 8
# Nor shorter sums; in float8 a head is two of them.
_MIN_SIZE = 16
# Parts of a cut sequence that are added up at a time: few by a single warp, where nobody waits for
# anybody, or many by four.
_FEW_PARTS = 8
_MANY_PARTS = 32


def split_attention(
    query: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    plan: SplitPlan,
    *,
    scale: float,
    out: torch.Tensor,
    kv_scales: torch.Tensor | None,
) -> None:
    """`paged_attention` of CUDA tensors (or interpreted), as planned; there must be a row."""
    num_seqs, num_heads, head_size = query.shape
    _, _, num_kv_heads, block_size, _ = kv_layer.shape
    assert query.stride(2) == block_tables.stride(1) == 1
    group = num_heads // num_kv_heads
    parts = torch.empty(
        (num_kv_heads, 2 * plan.num_programs, group, head_size),
        dtype=torch.float32,
        device=query.device,
    )
    logs = torch.empty(parts.shape[:3], dtype=torch.float32, device=query.device)
    is_float8 = kv_scales is not None
    if is_float8:
        assert head_size % 2 == 0
        kv_layer = kv_layer.view(torch.int16)
    shape: dict[str, Any] = {
        "KV_HEADS": num_kv_heads, "GROUP": group, "HEAD_SIZE": head_size, "TILE": plan.shape.tile,
        "WINDOW": plan.sliding_window or 0, "RECORD_SIZE": RECORD_SIZE,
    }  # fmt: skip
    launch: dict[str, Any] = {"CHAINED": chained_launch(query.device)}
    if launch["CHAINED"]:
        launch["launch_pdl"] = True
    smallest = 2 * _MIN_SIZE if is_float8 else _MIN_SIZE
    _attention_kernel[(num_kv_heads, plan.num_programs)](
        query, kv_layer, kv_scales, block_tables, seq_lens, plan.records, parts, logs, out,
        query.stride(0), query.stride(1), block_tables.stride(0), scale * math.log2(math.e),
        QUERIES=max(_MIN_QUERIES, next_power_of_two(group)), BLOCK_SIZE=block_size,
        BLOCK_DIM=max(smallest, next_power_of_two(head_size)), FLOAT8=is_float8,
        COMPILED=query.is_cuda, num_warps=plan.shape.num_warps, num_stages=plan.shape.num_stages,
        **shape, **launch,
    )  # fmt: skip
    num_cuts = min(num_seqs, plan.num_programs - 1)
    if num_cuts > 0:
        is_few = num_seqs * _FEW_PARTS >= 2 * plan.num_programs
        combine_kernel[(num_heads, num_cuts)](
            seq_lens, plan.records, plan.origins, parts, logs, out, plan.num_programs,
            BY_SEQUENCE=num_cuts == num_seqs, BLOCK_DIM=next_power_of_two(head_size),
            PARTS=_FEW_PARTS if is_few else _MANY_PARTS, num_warps=1 if is_few else 4,
            **shape, **launch,
        )  # fmt: skip


@jit
def _add_tile(scores: tl.tensor, peak: tl.tensor, total: tl.tensor) -> Any:
    """Weights of a tile's keys, by how much earlier weights shrink, new peak and total."""
    new_peak = tl.maximum(peak, tl.max(scores, axis=0))
    # A tile of padding has no score: its peak is replaced so that no NaN arises from it.
    new_peak = tl.where(new_peak > float("-inf"), new_peak, 0.0)
    weights = tl.exp2(scores - new_peak[None, :])
    decay = tl.exp2(peak - new_peak)
    return weights, decay[None, :], new_peak, total * decay + tl.sum(weights, axis=0)


@jit
def _attend(
    query_columns: tl.tensor, query_scale: tl.tensor, head_ptr: tl.tensor, table_ptr: tl.tensor,
    seq_len: tl.tensor, begin: tl.tensor, stop: tl.tensor,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, HEAD_SIZE: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr,
    FLOAT8: tl.constexpr, COMPILED: tl.constexpr,
) -> Any:  # fmt: skip
    """Tiles `begin` to `stop` of one sequence for the query heads at `query_columns`
    `[1, QUERIES]`.

    Returns the weighted sum of values `[BLOCK_DIM, QUERIES]`, the largest score and the sum of
    weights, both `[QUERIES]`.
    """
    # Elements of a row of a head, and those that are loaded.
    PAIR: tl.constexpr = 2 if FLOAT8 else 1
    SIZE: tl.constexpr = HEAD_SIZE // PAIR
    WIDTH: tl.constexpr = BLOCK_DIM // PAIR
    SIDE: tl.constexpr = KV_HEADS * BLOCK_SIZE * SIZE
    column, token = tl.arange(0, WIDTH), tl.arange(0, TILE)
    is_column = column < SIZE
    query_mask = is_column[:, None] & (tl.arange(0, QUERIES) < GROUP)[None, :]
    query_ptrs = query_columns + PAIR * column[:, None]
    query, query_odd = load_query(query_ptrs, query_mask, query_scale, FLOAT8)
    peak, total = tl.full([QUERIES], float("-inf"), tl.float32), tl.zeros([QUERIES], tl.float32)
    result = tl.zeros([WIDTH, QUERIES], tl.float32)
    result_odd = tl.zeros([WIDTH, QUERIES], tl.float32)
    position = begin * TILE + token
    block_id = tl.load(table_ptr + position // BLOCK_SIZE, mask=position < seq_len, other=0)
    key_ptr, value_ptr = head_ptr + column[None, :], head_ptr + SIDE + column[:, None]
    for tile in range(begin, stop):
        position = tile * TILE + token
        seen = position < seq_len
        if WINDOW > 0:
            seen &= position >= seq_len - WINDOW
        offset = block_id.to(tl.int64) * (2 * SIDE) + position % BLOCK_SIZE * SIZE
        ahead = position + TILE
        block_id = tl.load(table_ptr + ahead // BLOCK_SIZE, mask=ahead < seq_len, other=0)
        key_mask = seen[:, None] & is_column[None, :]
        key, key_odd = load_kv(key_ptr + offset[:, None], key_mask, query, FLOAT8, COMPILED)
        scores = tl.dot(key, query, input_precision="ieee")
        if FLOAT8:
            scores = tl.dot(key_odd, query_odd, scores, input_precision="ieee")
        else:
            scores *= query_scale
        scores = tl.where(seen[:, None], scores, float("-inf"))
        weights, decay, peak, total = _add_tile(scores, peak, total)
        # Read as columns: turned over in registers they would not be fetched ahead.
        value_mask = is_column[:, None] & seen[None, :]
        value, value_odd = load_kv(value_ptr + offset[None, :], value_mask, query, FLOAT8, COMPILED)
        weights = weights.to(query.dtype)
        result = tl.dot(value, weights, result * decay, input_precision="ieee")
        if FLOAT8:
            result_odd = tl.dot(value_odd, weights, result_odd * decay, input_precision="ieee")
    if FLOAT8:
        result = tl.join(result, result_odd).permute(0, 2, 1).reshape(BLOCK_DIM, QUERIES)
    return result, peak, total


@jit_for_any("table_stride")
def _attention_kernel(
    query_ptr: tl.tensor, kv_ptr: tl.tensor, scales_ptr: tl.tensor, tables_ptr: tl.tensor,
    lens_ptr: tl.tensor, records_ptr: tl.tensor, parts_ptr: tl.tensor, logs_ptr: tl.tensor,
    out_ptr: tl.tensor, query_stride: tl.tensor, query_head_stride: tl.tensor,
    table_stride: tl.tensor, scale_log2: tl.tensor,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, HEAD_SIZE: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr,
    FLOAT8: tl.constexpr, COMPILED: tl.constexpr, RECORD_SIZE: tl.constexpr, CHAINED: tl.constexpr,
) -> None:  # fmt: skip
    kv_head, program = tl.program_id(0), tl.program_id(1)
    if CHAINED:
        gdc_launch_dependents()
    sequence, tile, left, share, seq_len = load_record(records_ptr, program, RECORD_SIZE)
    head_ptr = kv_ptr + kv_head * (BLOCK_SIZE * HEAD_SIZE // (2 if FLOAT8 else 1))
    # Programs without a share write nothing and make room; there is always one that waits.
    if CHAINED and left > 0:
        first, tiles = tile_range(seq_len, TILE, WINDOW)
        prefetch(
            head_ptr, tables_ptr + sequence.to(tl.int64) * table_stride, seq_len, first + tile,
            KV_HEADS, HEAD_SIZE // (2 if FLOAT8 else 1), BLOCK_SIZE, TILE,
        )  # fmt: skip
        gdc_wait()
    query_scale, value_scale = scale_log2, 1.0
    if FLOAT8:
        query_scale *= tl.load(scales_ptr + kv_head)
        value_scale = tl.load(scales_ptr + KV_HEADS + kv_head)
    row, column = tl.arange(0, QUERIES), tl.arange(0, BLOCK_DIM)
    mask = (column < HEAD_SIZE)[:, None] & (row < GROUP)[None, :]
    head = kv_head * GROUP + row
    first_slot = 2 * (kv_head * tl.num_programs(1) + program)
    # Where the sequence begins in the row of all tiles.
    origin = program * share - tile
    while left > 0:
        first, tiles = tile_range(seq_len, TILE, WINDOW)
        stop = tl.minimum(tile + left, tiles)
        wide = sequence.to(tl.int64)
        result, peak, total = _attend(
            query_ptr + wide * query_stride + head[None, :] * query_head_stride, query_scale,
            head_ptr, tables_ptr + wide * table_stride, seq_len, first + tile, first + stop,
            KV_HEADS, GROUP, QUERIES, HEAD_SIZE, BLOCK_DIM, BLOCK_SIZE, TILE, WINDOW,
            FLOAT8, COMPILED,
        )  # fmt: skip
        result *= (value_scale / tl.where(total > 0, total, 1.0))[None, :]
        if stop - tile == tiles:
            out_row = wide * (KV_HEADS * GROUP) + head
            out_ptrs = out_ptr + out_row[None, :] * HEAD_SIZE + column[:, None]
            tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=mask)
        else:
            part = (first_slot + (origin >= program * share).to(tl.int32)) * GROUP + row
            part_ptrs = parts_ptr + part[None, :] * HEAD_SIZE + column[:, None]
            tl.store(part_ptrs, result, mask=mask)
            tl.store(logs_ptr + part, peak + tl.log2(total), mask=row < GROUP)
        left -= stop - tile
        origin += tiles
        tile = tile * 0
        sequence += 1
        seq_len = tl.load(lens_ptr + sequence, mask=left > 0, other=0)
