"""Keys and values of whole sequences, copied out of the paged pool into a pool of long blocks.

For kernels that cannot read the pool as it is: because it is in float8, or because they know no
block tables. What no query may see becomes zeros, whatever the pool holds there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels.dispatch import jit_for_any, next_power_of_two, runs_triton, tl

# Tokens that one program copies.
_TOKENS = 64


class GatheredKV(NamedTuple):
    """A pool `[num_seqs * width, 2, num_kv_heads, block_size, head_size]` and its int32 block
    tables `[num_seqs, width]`: sequence s owns blocks s * width and on."""

    kv_layer: torch.Tensor
    block_tables: torch.Tensor


def gathered_bytes(kv_layer: torch.Tensor, block_tables: torch.Tensor, dtype: torch.dtype) -> int:
    """About what `gather_kv` allocates: a slot for each one that the tables can name."""
    return block_tables.numel() * kv_layer[0].numel() * dtype.itemsize


def gather_kv(
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    block_size: int,
    dtype: torch.dtype,
    kv_scales: torch.Tensor | None = None,
    sliding_window: int | None = None,
) -> GatheredKV:
    """The first `seq_lens[s]` tokens of each sequence, in blocks of another size and type.

    Arguments as in `prefill_attention`; with kv_scales the copies are multiplied by them. GPU
    only. block_size: a multiple of 64. Blocks behind a sequence's last one are not written.
    """
    _, _, num_kv_heads, page, head_size = kv_layer.shape
    num_seqs, num_pages = block_tables.shape
    width = -(-num_pages * page // block_size)
    shape = (num_seqs * width, 2, num_kv_heads, block_size, head_size)
    gathered = torch.empty(shape, dtype=dtype, device=kv_layer.device)
    tables = torch.empty((num_seqs, width), dtype=torch.int32, device=kv_layer.device)
    assert runs_triton(kv_layer)
    assert block_size % _TOKENS == 0
    if num_seqs > 0:
        _gather_kernel[(width * (block_size // _TOKENS), 2 * num_kv_heads, num_seqs)](
            kv_layer, block_tables, cu_seqlens_q, seq_lens, kv_scales, gathered, tables,
            block_tables.stride(0), width,
            KV_HEADS=num_kv_heads, HEAD_SIZE=head_size, BLOCK_DIM=next_power_of_two(head_size),
            PAGE=page, BLOCK_SIZE=block_size, TOKENS=_TOKENS, SCALED=kv_scales is not None,
            WINDOW=sliding_window or 0, num_warps=4,
        )  # fmt: skip
    return GatheredKV(gathered, tables)


@jit_for_any("table_stride", "width")
def _gather_kernel(
    kv_ptr: tl.tensor, tables_ptr: tl.tensor, starts_ptr: tl.tensor, lens_ptr: tl.tensor,
    scales_ptr: tl.tensor, out_ptr: tl.tensor, out_tables_ptr: tl.tensor, table_stride: tl.tensor,
    width: tl.tensor, KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_DIM: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_SIZE: tl.constexpr, TOKENS: tl.constexpr, SCALED: tl.constexpr,
    WINDOW: tl.constexpr,
) -> None:  # fmt: skip
    side_head, sequence = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first_token = tl.program_id(0) * TOKENS
    seq_len = tl.load(lens_ptr + sequence)
    out_block = sequence * width + first_token // BLOCK_SIZE
    is_first = (side_head == 0) & (first_token % BLOCK_SIZE == 0)
    tl.store(out_tables_ptr + out_block, out_block.to(tl.int32), mask=is_first)
    # The rest of a block that holds tokens is zeroed, what is behind it left alone.
    if first_token >= (seq_len + BLOCK_SIZE - 1) // BLOCK_SIZE * BLOCK_SIZE:
        return
    token = first_token + tl.arange(0, TOKENS)
    column = tl.arange(0, BLOCK_DIM)[None, :]
    seen = token < seq_len
    if WINDOW > 0:
        query_len = tl.load(starts_ptr + sequence + 1) - tl.load(starts_ptr + sequence)
        seen &= token > seq_len - query_len - WINDOW
    mask = seen[:, None] & (column < HEAD_SIZE)
    table_ptr = tables_ptr + sequence * table_stride
    block_id = tl.load(table_ptr + token // PAGE, mask=seen, other=0).to(tl.int64)
    row = (block_id * (2 * KV_HEADS) + side_head) * PAGE + token % PAGE
    kv = tl.load(kv_ptr + row[:, None] * HEAD_SIZE + column, mask=mask, other=0.0)
    if SCALED:
        kv = kv.to(tl.float32) * tl.load(scales_ptr + side_head)
    out_row = (out_block * (2 * KV_HEADS) + side_head) * BLOCK_SIZE + token % BLOCK_SIZE
    out_ptrs = out_ptr + out_row[:, None] * HEAD_SIZE + column
    tl.store(out_ptrs, kv.to(out_ptr.dtype.element_ty), mask=column < HEAD_SIZE)
