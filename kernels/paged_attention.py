"""Decode attention: one query token per sequence over its paged keys and values.

1. The grid is (KV heads, splits, sequences). Its size follows from tensor shapes alone, so that a
   captured CUDA graph stays right whatever the lengths are.
2. A program takes one split of one sequence: an equal share of the tiles that its length (read on
   the device) and the window leave, at least `_MIN_TILES` of them. It reads every key and value
   once for all query heads of the KV head. Surplus programs return at once.
3. With one split a program writes the output itself. With more it writes its share, normalised,
   and the base-2 logarithm of its sum of weights; a second kernel combines the shares.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from kernels.attention_plan import AttentionPlan, plan_decode
from kernels.dispatch import (
    jit,
    jit_for_any,
    next_power_of_two,
    num_multiprocessors,
    runs_triton,
    tl,
)
from kernels.gathered_attention import gathered_attention

# Tensor cores take no fewer rows; smaller groups of query heads are padded.
_MIN_ROWS = 16
# Tiles that are worth a program of their own.
_MIN_TILES = 4
_MAX_SPLITS = 128
# Programs per multiprocessor that splitting aims at: two resident, twice over for an even finish.
_PROGRAMS_PER_MULTIPROCESSOR = 4


def paged_attention(
    query: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    out: torch.Tensor | None = None,
    sliding_window: int | None = None,
    plan: AttentionPlan | None = None,
    kv_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of each sequence's newest token, whose key and value are already stored.

    query: `[num_seqs, num_heads, head_size]`, last dimension contiguous. kv_layer: `[num_blocks, 2,
    num_kv_heads, block_size, head_size]`, contiguous, in query's dtype; block_size a power of two.
    block_tables: int32 `[num_seqs, max_blocks]`; entries past a sequence's last block are not
    read. seq_lens: int32 `[num_seqs]`, the current token included; a row of length 0 (padding)
    gives zeros. With a sliding_window of w a token sees itself and the w - 1 before it.
    plan: what `plan_decode` made of the same tables, lengths and window; spares the CPU to make it
    anew in each layer. kv_scales: float32 `[2, num_kv_heads]` where kv_layer is float8_e4m3fn, what
    its keys and values are to be multiplied by. Returns out, `[num_seqs, num_heads, head_size]`
    contiguous.
    """
    if out is None:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    assert query.dtype == out.dtype
    assert (kv_layer.dtype == query.dtype) == (kv_scales is None)
    assert kv_layer.is_contiguous()
    assert out.is_contiguous()
    if runs_triton(query):
        assert kv_scales is None, "this kernel reads no float8"
        _paged_attention_triton(query, kv_layer, block_tables, seq_lens, scale, out, sliding_window)
        return out
    if plan is None:
        plan = plan_decode(
            block_tables, seq_lens, kv_layer,
            num_heads=query.shape[1], sliding_window=sliding_window,
        )  # fmt: skip
    gathered_attention(query, kv_layer, plan, scale=scale, out=out, kv_scales=kv_scales)
    return out


def _paged_attention_triton(
    query: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    sliding_window: int | None,
) -> None:
    num_seqs, num_heads, head_size = query.shape
    _, _, num_kv_heads, block_size, _ = kv_layer.shape
    assert query.stride(2) == block_tables.stride(1) == 1
    if num_seqs == 0:
        return
    # Rows of 1 KiB: a tile of keys and one of values take 32 KiB for heads of 128 in bfloat16.
    tile = max(16, min(64, 16384 // (query.element_size() * next_power_of_two(head_size))))
    longest = block_tables.shape[1] * block_size
    if sliding_window is not None:
        longest = min(longest, sliding_window + tile)
    splits = _num_splits(num_seqs * num_kv_heads, -(-longest // tile), query.device)
    share, share_sums = out, out
    if splits > 1:
        share = torch.empty(
            (num_seqs, num_heads, splits, head_size), dtype=torch.float32, device=query.device
        )
        share_sums = torch.empty(share.shape[:3], dtype=torch.float32, device=query.device)
    block_dim = next_power_of_two(head_size)
    _split_kernel[(num_kv_heads, splits, num_seqs)](
        query, kv_layer, block_tables, seq_lens, share, share_sums,
        query.stride(0), query.stride(1), block_tables.stride(0), splits,
        scale * math.log2(math.e),
        KV_HEADS=num_kv_heads, GROUP=num_heads // num_kv_heads,
        ROWS=max(_MIN_ROWS, next_power_of_two(num_heads // num_kv_heads)),
        HEAD_SIZE=head_size, BLOCK_DIM=block_dim, BLOCK_SIZE=block_size, TILE=tile,
        WINDOW=sliding_window or 0, MIN_TILES=_MIN_TILES, SHARED=splits > 1,
        num_warps=8 if query.dtype == torch.float32 else 4, num_stages=3,
    )  # fmt: skip
    if splits > 1:
        _combine_kernel[(num_heads, num_seqs)](
            share, share_sums, seq_lens, out, splits,
            HEADS=num_heads, HEAD_SIZE=head_size, BLOCK_DIM=block_dim, TILE=tile,
            WINDOW=sliding_window or 0, BLOCK_SPLITS=next_power_of_two(splits),
            MIN_TILES=_MIN_TILES, num_warps=4,
        )  # fmt: skip


def _num_splits(num_pairs: int, num_tiles: int, device: torch.device) -> int:
    """Splits per (sequence, KV head), from shapes only."""
    wanted = -(-_PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors(device) // num_pairs)
    return max(1, min(wanted, -(-num_tiles // _MIN_TILES), _MAX_SPLITS))


@jit
def _tile_share(
    seq_len: tl.tensor, splits: tl.tensor, TILE: tl.constexpr, WINDOW: tl.constexpr,
    MIN_TILES: tl.constexpr,
) -> Any:  # fmt: skip
    """First tile to read, one past the last, and how many of them a split takes."""
    first = 0
    if WINDOW > 0:
        first = tl.maximum(seq_len - WINDOW, 0) // TILE
    last = tl.cdiv(seq_len, TILE)
    return first, last, tl.maximum(tl.cdiv(last - first, splits), MIN_TILES)


@jit_for_any("table_stride", "splits")
def _split_kernel(
    query_ptr: tl.tensor, kv_ptr: tl.tensor, tables_ptr: tl.tensor, lens_ptr: tl.tensor,
    share_ptr: tl.tensor, sums_ptr: tl.tensor, query_stride: tl.tensor,
    query_head_stride: tl.tensor, table_stride: tl.tensor, splits: tl.tensor,
    scale_log2: tl.tensor,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_SIZE: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr,
    MIN_TILES: tl.constexpr, SHARED: tl.constexpr,
) -> None:  # fmt: skip
    kv_head, split, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    seq_len = tl.load(lens_ptr + sequence)
    first, last, tiles = _tile_share(seq_len, splits, TILE, WINDOW, MIN_TILES)
    first += split * tiles
    last = tl.minimum(first + tiles, last)
    if SHARED and first >= last:
        return
    row, column, token = tl.arange(0, ROWS), tl.arange(0, BLOCK_DIM), tl.arange(0, TILE)
    row_mask = (row < GROUP)[:, None] & (column < HEAD_SIZE)[None, :]
    head = kv_head * GROUP + row
    query_rows = query_ptr + sequence * query_stride + head[:, None] * query_head_stride
    query = tl.load(query_rows + column[None, :], mask=row_mask, other=0.0)
    table_ptr = tables_ptr + sequence * table_stride
    # Where a token's key lies: its block, this head, its offset in the block.
    SIDE: tl.constexpr = KV_HEADS * BLOCK_SIZE * HEAD_SIZE
    head_ptr = kv_ptr + kv_head * (BLOCK_SIZE * HEAD_SIZE) + column[None, :]
    peak, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    for tile in range(first, last):
        position = tile * TILE + token
        seen = position < seq_len
        if WINDOW > 0:
            seen &= position >= seq_len - WINDOW
        block_id = tl.load(table_ptr + position // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
        keys = head_ptr + (block_id * (2 * SIDE) + position % BLOCK_SIZE * HEAD_SIZE)[:, None]
        mask = seen[:, None] & (column < HEAD_SIZE)[None, :]
        key = tl.load(keys, mask=mask, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_peak[:, None])
        decay = tl.exp2(peak - new_peak)
        total = total * decay + tl.sum(weights, axis=1)
        value = tl.load(keys + SIDE, mask=mask, other=0.0)
        weights = weights.to(value.dtype)
        result = tl.dot(weights, value, result * decay[:, None], input_precision="ieee")
        peak = new_peak
    result = result / tl.where(total > 0, total, 1.0)[:, None]
    out_row = (sequence * KV_HEADS * GROUP + head) * splits + split
    out_ptrs = share_ptr + out_row[:, None] * HEAD_SIZE + column[None, :]
    tl.store(out_ptrs, result.to(share_ptr.dtype.element_ty), mask=row_mask)
    if SHARED:
        tl.store(sums_ptr + out_row, peak + tl.log2(total), mask=row < GROUP)


@jit_for_any("splits")
def _combine_kernel(
    share_ptr: tl.tensor, sums_ptr: tl.tensor, lens_ptr: tl.tensor, out_ptr: tl.tensor,
    splits: tl.tensor, HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_DIM: tl.constexpr,
    TILE: tl.constexpr, WINDOW: tl.constexpr, BLOCK_SPLITS: tl.constexpr, MIN_TILES: tl.constexpr,
) -> None:  # fmt: skip
    head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    seq_len = tl.load(lens_ptr + sequence)
    first, last, tiles = _tile_share(seq_len, splits, TILE, WINDOW, MIN_TILES)
    used = tl.cdiv(last - first, tiles)
    row = sequence * HEADS + head
    split, column = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_DIM)
    sums = tl.load(sums_ptr + row * splits + split, mask=split < used, other=float("-inf"))
    # A row of length 0 has no shares: its peak is replaced so that no NaN arises from it.
    peak = tl.max(sums, axis=0)
    weights = tl.exp2(sums - tl.where(used > 0, peak, 0.0))
    mask = (split < used)[:, None] & (column < HEAD_SIZE)[None, :]
    shares = share_ptr + (row * splits + split)[:, None] * HEAD_SIZE + column[None, :]
    share = tl.load(shares, mask=mask, other=0.0)
    total = tl.sum(weights, axis=0)
    result = tl.sum(share * weights[:, None], axis=0) / tl.where(used > 0, total, 1.0)
    out_ptrs = out_ptr + row * HEAD_SIZE + column
    tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=column < HEAD_SIZE)
