"""Rotary position embedding, rotate-half style: element i turns with element i + rotary_dim / 2."""

from __future__ import annotations

import torch

from kernels.dispatch import jit, next_power_of_two, runs_triton, tl


def apply_rotary(
    query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor, cos_sin_cache: torch.Tensor
) -> None:
    """Rotates query and key in place; elements from rotary_dim on stay as they are.

    query: `[num_tokens, num_heads, head_size]`, key: `[num_tokens, num_kv_heads, head_size]`, last
    dimension contiguous (views into a qkv projection are fine). positions: int32 or int64
    `[num_tokens]`. cos_sin_cache: float32 `[max_len, rotary_dim]`, contiguous; a row holds
    rotary_dim / 2 cosines, then as many sines. Computed in float32.
    """
    assert cos_sin_cache.dtype == torch.float32
    assert cos_sin_cache.shape[1] <= query.shape[2] == key.shape[2]
    if runs_triton(query):
        _apply_rotary_triton(query, key, positions, cos_sin_cache)
        return
    cos, sin = cos_sin_cache.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)
    if _lies_behind(key, query):
        num_heads = query.shape[1] + key.shape[1]
        shape = (query.shape[0], num_heads, query.shape[2])
        _rotate_reference(query.as_strided(shape, query.stride()), cos, sin)
        return
    _rotate_reference(query, cos, sin)
    _rotate_reference(key, cos, sin)


def _lies_behind(key: torch.Tensor, query: torch.Tensor) -> bool:
    """Whether the heads of key follow those of query in memory, as in a qkv projection."""
    gap = key.data_ptr() - query.data_ptr()
    heads_bytes = query.shape[1] * query.stride(1) * query.element_size()
    return key.stride() == query.stride() and gap == heads_bytes < query.stride(0) * query.itemsize


def _rotate_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotates `[num_tokens, heads, head_size]` by `[num_tokens, 1, rotary_dim / 2]`."""
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    old_first, old_second = first.float(), second.float()
    new_first = torch.mul(old_first, cos).addcmul_(old_second, sin, value=-1)
    second.copy_(torch.mul(old_second, cos).addcmul_(old_first, sin))
    first.copy_(new_first)


def _apply_rotary_triton(
    query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor, cos_sin_cache: torch.Tensor
) -> None:
    assert query.stride(2) == key.stride(2) == 1
    num_tokens, num_heads, _ = query.shape
    num_kv_heads = key.shape[1]
    half = cos_sin_cache.shape[1] // 2
    if num_tokens == 0:
        return
    _rotary_kernel[(num_tokens,)](
        query, key, positions, cos_sin_cache,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1),
        HEADS=num_heads, KV_HEADS=num_kv_heads, HALF=half,
        BLOCK_HEADS=next_power_of_two(num_heads), BLOCK_KV_HEADS=next_power_of_two(num_kv_heads),
        BLOCK_HALF=next_power_of_two(half), num_warps=4,
    )  # fmt: skip


@jit
def _rotary_kernel(
    query_ptr: tl.tensor, key_ptr: tl.tensor, positions_ptr: tl.tensor, cos_sin_ptr: tl.tensor,
    query_stride: tl.tensor, query_head_stride: tl.tensor, key_stride: tl.tensor,
    key_head_stride: tl.tensor, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_KV_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
) -> None:  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_HALF)
    row_ptr = cos_sin_ptr + tl.load(positions_ptr + token).to(tl.int64) * (2 * HALF)
    cos = tl.load(row_ptr + column, mask=column < HALF, other=0.0)[None, :]
    sin = tl.load(row_ptr + HALF + column, mask=column < HALF, other=0.0)[None, :]
    query_row = query_ptr + token * query_stride
    _rotate(query_row, query_head_stride, cos, sin, HEADS, BLOCK_HEADS, HALF, BLOCK_HALF)
    key_row = key_ptr + token * key_stride
    _rotate(key_row, key_head_stride, cos, sin, KV_HEADS, BLOCK_KV_HEADS, HALF, BLOCK_HALF)


@jit
def _rotate(
    row_ptr: tl.tensor, head_stride: tl.tensor, cos: tl.tensor, sin: tl.tensor, HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
) -> None:  # fmt: skip
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    column = tl.arange(0, BLOCK_HALF)[None, :]
    mask = (head < HEADS) & (column < HALF)
    first_ptr = row_ptr + head * head_stride + column
    first = tl.load(first_ptr, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(first_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
    dtype = row_ptr.dtype.element_ty
    tl.store(first_ptr, (first * cos - second * sin).to(dtype), mask=mask)
    tl.store(first_ptr + HALF, (second * cos + first * sin).to(dtype), mask=mask)
