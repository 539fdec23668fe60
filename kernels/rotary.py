"""Rotary position embedding, rotate-half style: element i turns with element i + rotary_dim / 2."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels.dispatch import jit, next_power_of_two, runs_triton, tl


class RotaryRows(NamedTuple):
    """What a step's tokens are turned by, the same in every layer. float32."""

    cos: torch.Tensor  # [num_tokens, 1, 1, rotary_dim / 2]
    signed_sin: torch.Tensor  # [num_tokens, 1, 2, rotary_dim / 2]: negative, then positive


def gather_rotary(positions: torch.Tensor, cos_sin_cache: torch.Tensor) -> RotaryRows:
    """These tokens' rows of the cache, as the CPU wants them."""
    half = cos_sin_cache.shape[1] // 2
    rows = cos_sin_cache.index_select(0, positions).view(len(positions), 1, 2, half)
    cos, sin = rows[:, :, :1], rows[:, :, 1:]
    return RotaryRows(cos, torch.cat((-sin, sin), dim=2))


def apply_rotary(
    query: torch.Tensor,
    key: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    *,
    rows: RotaryRows | None = None,
) -> None:
    """Rotates query and key in place; elements from rotary_dim on stay as they are.

    query: `[num_tokens, num_heads, head_size]`, key: `[num_tokens, num_kv_heads, head_size]`, last
    dimension contiguous (views into a qkv projection are fine). positions: int32 or int64
    `[num_tokens]`. cos_sin_cache: float32 `[max_len, rotary_dim]`, contiguous; a row holds
    rotary_dim / 2 cosines, then as many sines. Computed in float32. rows: what `gather_rotary`
    gave for the same positions; spares the CPU to look them up anew in each layer.
    """
    assert cos_sin_cache.dtype == torch.float32
    assert cos_sin_cache.shape[1] <= query.shape[2] == key.shape[2]
    if runs_triton(query):
        _apply_rotary_triton(query, key, positions, cos_sin_cache)
        return
    if rows is None:
        rows = gather_rotary(positions, cos_sin_cache)
    if _lies_behind(key, query):
        num_heads = query.shape[1] + key.shape[1]
        shape = (query.shape[0], num_heads, query.shape[2])
        _rotate_reference(query.as_strided(shape, query.stride()), rows)
        return
    _rotate_reference(query, rows)
    _rotate_reference(key, rows)


def _lies_behind(key: torch.Tensor, query: torch.Tensor) -> bool:
    """Whether the heads of key follow those of query in memory, as in a qkv projection."""
    gap = key.data_ptr() - query.data_ptr()
    heads_bytes = query.shape[1] * query.stride(1) * query.element_size()
    return key.stride() == query.stride() and gap == heads_bytes < query.stride(0) * query.itemsize


def _rotate_reference(x: torch.Tensor, rows: RotaryRows) -> None:
    """Rotates `[num_tokens, heads, head_size]` in place."""
    half = rows.cos.shape[-1]
    halves = x[..., : 2 * half].view(*x.shape[:-1], 2, half)
    wide = halves.float()
    turned = torch.mul(wide, rows.cos).addcmul_(wide.flip(2), rows.signed_sin)
    halves.copy_(turned)


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
