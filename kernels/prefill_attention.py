"""Prefill attention: chunks of query tokens over paged keys and values, causal, ragged.

1. The grid is (query tiles, query heads, sequences), the longest tiles first: causality makes the
   last tiles of a sequence the most expensive ones. Tiles past a sequence's end return at once.
2. A program walks its keys in two runs: tiles that every query of the tile sees whole, without
   masks, then those on the diagonal. With a sliding window all tiles are masked and the walk
   starts where the first query's window does.
3. Keys come from the pool by block table, so a cached prefix needs nothing special: query i of a
   sequence sits at position seq_len - q_len + i.
4. KV in float8 is widened in registers. Its scales are of whole heads, so they are multiplied into
   scores and results.

`gluon_prefill.py` does the same on Hopper GPUs at half again the speed; which one runs was chosen
when the engine started, see `attention_backend.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from kernels.attention_backend import GLUON_MIN_QUERIES, AttentionBackend
from kernels.attention_plan import AttentionPlan, plan_prefill
from kernels.dispatch import jit, jit_for_any, next_power_of_two, runs_triton, tl
from kernels.gather_kv import gather_kv, gathered_bytes
from kernels.gathered_attention import gathered_attention
from kernels.gluon_prefill import MAX_PAGE, gluon_prefill
from kernels.prefill_tiles import PrefillTiles, plan_tiles

# Float8 KV is widened into a copy for Gluon, as long as that is so small beside the activations of
# a step that nobody needs to have reserved it.
_MAX_GATHERED_BYTES = 256 << 20


def prefill_attention(
    query: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    max_seqlen_q: int,
    scale: float,
    out: torch.Tensor | None = None,
    sliding_window: int | None = None,
    plan: AttentionPlan | PrefillTiles | None = None,
    kv_scales: torch.Tensor | None = None,
    backend: AttentionBackend = "triton",
) -> torch.Tensor:
    """Causal attention of the newest tokens of each sequence, whose KV is already stored.

    query: `[num_tokens, num_heads, head_size]`, last dimension contiguous; sequence s owns tokens
    cu_seqlens_q[s] up to cu_seqlens_q[s + 1]. kv_layer: `[num_blocks, 2, num_kv_heads, block_size,
    head_size]`, contiguous, in query's dtype; block_size a power of two. block_tables: int32
    `[num_seqs, max_blocks]`; entries past a sequence's last block are not read. cu_seqlens_q: int32
    `[num_seqs + 1]`, from 0. seq_lens: int32 `[num_seqs]`, cached prefix and new tokens together;
    a padding sequence has no query tokens. max_seqlen_q: the most tokens of one sequence. With a
    sliding_window of w a token sees itself and the w - 1 before it.
    plan: what `plan_prefill` on a CPU, and `plan_tiles` on a GPU with the backend "gluon", made of
    the same lengths; spares to make it anew in each layer. kv_scales: float32 `[2, num_kv_heads]`
    where kv_layer is float8_e4m3fn, what its keys and values are to be multiplied by. backend:
    which kernel runs on a GPU; what it does worse Triton does. Returns out, `[num_tokens,
    num_heads, head_size]` contiguous; tokens that no sequence owns are left as they were.
    """
    out = torch.empty_like(query, memory_format=torch.contiguous_format) if out is None else out
    assert query.dtype == out.dtype
    assert (kv_layer.dtype == query.dtype) == (kv_scales is None)
    assert kv_layer.is_contiguous()
    assert out.is_contiguous()
    if runs_triton(query):
        if backend == "gluon" and _suits_gluon(query, kv_layer, block_tables, max_seqlen_q):
            _prefill_attention_gluon(
                query, kv_layer, block_tables, cu_seqlens_q, seq_lens, max_seqlen_q, scale, out,
                sliding_window, plan, kv_scales,
            )  # fmt: skip
            return out
        _prefill_attention_triton(
            query, kv_layer, block_tables, cu_seqlens_q, seq_lens, max_seqlen_q, scale, out,
            sliding_window, kv_scales,
        )  # fmt: skip
        return out
    if not isinstance(plan, AttentionPlan):
        plan = plan_prefill(
            block_tables, cu_seqlens_q, seq_lens, kv_layer,
            num_heads=query.shape[1], sliding_window=sliding_window,
        )  # fmt: skip
    gathered_attention(query, kv_layer, plan, scale=scale, out=out, kv_scales=kv_scales)
    return out


def _prefill_attention_gluon(
    query: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    max_seqlen_q: int,
    scale: float,
    out: torch.Tensor,
    sliding_window: int | None,
    plan: AttentionPlan | PrefillTiles | None,
    kv_scales: torch.Tensor | None,
) -> None:
    if not isinstance(plan, torch.Tensor):
        plan = plan_tiles(cu_seqlens_q, seq_lens, query.shape[0])
    if kv_scales is not None:
        kv_layer, block_tables = gather_kv(
            kv_layer, block_tables, cu_seqlens_q, seq_lens, block_size=MAX_PAGE,
            dtype=query.dtype, kv_scales=kv_scales, sliding_window=sliding_window,
        )  # fmt: skip
    gluon_prefill(
        query, kv_layer, block_tables, plan, max_seqlen_q=max_seqlen_q, scale=scale,
        out=out, sliding_window=sliding_window,
    )  # fmt: skip


def _suits_gluon(
    query: torch.Tensor, kv_layer: torch.Tensor, block_tables: torch.Tensor, max_seqlen_q: int
) -> bool:
    if max_seqlen_q < GLUON_MIN_QUERIES:
        return False
    if kv_layer.dtype == query.dtype:
        return True
    return gathered_bytes(kv_layer, block_tables, query.dtype) <= _MAX_GATHERED_BYTES


def _prefill_attention_triton(
    query: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    max_seqlen_q: int,
    scale: float,
    out: torch.Tensor,
    sliding_window: int | None,
    kv_scales: torch.Tensor | None,
) -> None:
    _, num_heads, head_size = query.shape
    _, _, num_kv_heads, block_size, _ = kv_layer.shape
    num_seqs = seq_lens.shape[0]
    assert query.stride(2) == block_tables.stride(1) == 1
    if num_seqs == 0 or max_seqlen_q == 0:
        return
    rows, tile, num_warps, num_stages = _config(query.dtype, head_size, max_seqlen_q)
    num_tiles = -(-max_seqlen_q // rows)
    _prefill_kernel[(num_tiles, num_heads, num_seqs)](
        query, kv_layer, kv_scales, block_tables, cu_seqlens_q, seq_lens, out,
        query.stride(0), query.stride(1), block_tables.stride(0), scale * math.log2(math.e),
        HEADS=num_heads, KV_HEADS=num_kv_heads, HEAD_SIZE=head_size,
        BLOCK_DIM=next_power_of_two(head_size), BLOCK_SIZE=block_size, ROWS=rows, TILE=tile,
        WINDOW=sliding_window or 0, SCALED=kv_scales is not None,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip


def _config(dtype: torch.dtype, head_size: int, max_seqlen_q: int) -> tuple[int, int, int, int]:
    """Query rows and keys of a tile, warps, pipeline stages."""
    block_dim = next_power_of_two(head_size)
    if dtype == torch.float32:  # no tensor cores: products live in registers
        return (16, 16, 4, 1) if block_dim > 128 else (32, 32, 8, 1)
    rows = max(16, next_power_of_two(max_seqlen_q))
    if block_dim > 128:
        return min(rows, 128), 32, 8, 2
    # On an H200 half as fast again for short prompts as with 128 rows, and as fast for long ones.
    return min(rows, 64), 64, 4, 3


@jit_for_any("table_stride")
def _prefill_kernel(
    query_ptr: tl.tensor, kv_ptr: tl.tensor, scales_ptr: tl.tensor, tables_ptr: tl.tensor,
    starts_ptr: tl.tensor, lens_ptr: tl.tensor, out_ptr: tl.tensor, query_stride: tl.tensor,
    query_head_stride: tl.tensor, table_stride: tl.tensor, scale_log2: tl.tensor,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr,
    SCALED: tl.constexpr,
) -> None:  # fmt: skip
    head, sequence = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first_token = tl.load(starts_ptr + sequence)
    query_len = tl.load(starts_ptr + sequence + 1) - first_token
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    if first_row >= query_len:
        return
    seq_len = tl.load(lens_ptr + sequence)
    row, column = first_row + tl.arange(0, ROWS), tl.arange(0, BLOCK_DIM)
    row_mask = (row < query_len)[:, None] & (column < HEAD_SIZE)[None, :]
    token = (first_token + row).to(tl.int64)[:, None]
    query_rows = query_ptr + token * query_stride + head * query_head_stride
    query = tl.load(query_rows + column[None, :], mask=row_mask, other=0.0)
    first_position = seq_len - query_len + first_row
    # One past the last key of the tile's last query; keys that even its first query sees.
    end = tl.minimum(first_position + ROWS, seq_len)
    start, whole = 0, (first_position + 1) // TILE * TILE
    if WINDOW > 0:
        start = tl.maximum(first_position - WINDOW + 1, 0) // TILE * TILE
        whole = start
    kv_head = head // (HEADS // KV_HEADS)
    if SCALED:
        scale_log2 *= tl.load(scales_ptr + kv_head)
    head_ptr = kv_ptr + kv_head * (BLOCK_SIZE * HEAD_SIZE) + column[None, :]
    table_ptr = tables_ptr + sequence * table_stride
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    peak, total, result = _walk(
        query, head_ptr, table_ptr, first_position, start, whole, end, peak, total, result,
        scale_log2, KV_HEADS, HEAD_SIZE, BLOCK_DIM, BLOCK_SIZE, ROWS, TILE, WINDOW, False,
    )  # fmt: skip
    peak, total, result = _walk(
        query, head_ptr, table_ptr, first_position, whole, end, end, peak, total, result,
        scale_log2, KV_HEADS, HEAD_SIZE, BLOCK_DIM, BLOCK_SIZE, ROWS, TILE, WINDOW, True,
    )  # fmt: skip
    # A row past the chunk's end may see nothing at all.
    total = tl.where(total > 0, total, 1.0)
    if SCALED:
        total /= tl.load(scales_ptr + KV_HEADS + kv_head)
    result = result / total[:, None]
    out_ptrs = out_ptr + (token * HEADS + head) * HEAD_SIZE + column[None, :]
    tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=row_mask)


@jit
def _walk(
    query: tl.tensor, head_ptr: tl.tensor, table_ptr: tl.tensor, first_position: tl.tensor,
    start: tl.tensor, stop: tl.tensor, end: tl.tensor, peak: tl.tensor, total: tl.tensor,
    result: tl.tensor, scale_log2: tl.tensor, KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    WINDOW: tl.constexpr, MASKED: tl.constexpr,
) -> Any:  # fmt: skip
    """Folds the keys from `start` up to `stop` into the running softmax; none from `end` on.

    What no query of the tile sees is not loaded: its slot may hold anything, NaN included.
    """
    SIDE: tl.constexpr = KV_HEADS * BLOCK_SIZE * HEAD_SIZE
    column = tl.arange(0, BLOCK_DIM)[None, :]
    position = first_position + tl.arange(0, ROWS)
    for tile in range(start, stop, TILE):
        key_position = tile + tl.arange(0, TILE)
        mask = column < HEAD_SIZE
        if MASKED:
            stored = key_position < end
            if WINDOW > 0:
                stored &= key_position > first_position - WINDOW
            block_id = tl.load(table_ptr + key_position // BLOCK_SIZE, mask=stored, other=0)
            mask = mask & stored[:, None]
        else:
            block_id = tl.load(table_ptr + key_position // BLOCK_SIZE)
        block_offset = block_id.to(tl.int64) * (2 * SIDE)
        keys = head_ptr + (block_offset + key_position % BLOCK_SIZE * HEAD_SIZE)[:, None]
        key = tl.load(keys, mask=mask, other=0.0).to(query.dtype)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        if MASKED:
            hidden = key_position[None, :] > position[:, None]
            if WINDOW > 0:
                hidden |= key_position[None, :] <= position[:, None] - WINDOW
            scores = tl.where(hidden, float("-inf"), scores)
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        # A window may hide a whole tile from a query; its peak is then still -inf.
        base = new_peak
        if WINDOW > 0:
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores - base[:, None])
        decay = tl.exp2(peak - base)
        total = total * decay + tl.sum(weights, axis=1)
        value = tl.load(keys + SIDE, mask=mask, other=0.0).to(query.dtype)
        weights = weights.to(value.dtype)
        result = tl.dot(weights, value, result * decay[:, None], input_precision="ieee")
        peak = new_peak
    return peak, total, result
