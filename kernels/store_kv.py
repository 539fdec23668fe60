"""Writes the keys and values of new tokens into their slots of one layer's KV blocks.

A pool in float8_e4m3fn takes them divided by their head's scale and saturated: what would overflow
becomes the largest finite value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels.dispatch import jit, next_power_of_two, runs_triton, tl

FLOAT8_MAX = 448.0  # of float8_e4m3fn


class StorePlan(NamedTuple):
    """Where a step's tokens go, the same in every layer.

    `tokens`: which tokens are stored, None for all. `block_ids`, `offsets`: int64, one for each
    of them.
    """

    tokens: torch.Tensor | None
    block_ids: torch.Tensor
    offsets: torch.Tensor


def plan_store(slot_mapping: torch.Tensor, block_size: int) -> StorePlan:
    """What `store_kv` would work out anew in each layer. For tensors on the CPU."""
    slots = slot_mapping.long()
    kept = slots >= 0
    tokens = None
    if not kept.all():
        tokens = kept.nonzero().squeeze(1)
        slots = slots[tokens]
    return StorePlan(tokens, slots // block_size, slots % block_size)


def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_layer: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    plan: StorePlan | None = None,
    kv_scales: torch.Tensor | None = None,
) -> None:
    """Stores token i at slot `slot_mapping[i]` = block_id * block_size + offset; -1 skips it.

    key, value: `[num_tokens, num_kv_heads, head_size]`, last dimension contiguous (views into a qkv
    projection are fine), in kv_layer's dtype unless that is float8_e4m3fn. kv_layer: `[num_blocks,
    2, num_kv_heads, block_size, head_size]`, contiguous. slot_mapping: int32 or int64
    `[num_tokens]`, no slot twice. plan: what `plan_store` made of it; spares the CPU to make it
    anew in each layer. kv_scales: of a float8 kv_layer, float32 `[2, num_kv_heads]`, what keys and
    values are divided by.
    """
    assert key.shape == value.shape
    assert key.dtype == value.dtype
    assert (key.dtype == kv_layer.dtype) == (kv_scales is None)
    if runs_triton(kv_layer):
        _store_kv_triton(key, value, kv_layer, slot_mapping, kv_scales)
    else:
        plan = plan or plan_store(slot_mapping, kv_layer.shape[3])
        store_rows(key, value, kv_layer, plan, kv_scales)


def to_float8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x / scale in float8_e4m3fn, saturated; scale broadcasts. NaN stays NaN."""
    return (x.float() / scale).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn)


def store_rows(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_layer: torch.Tensor,
    plan: StorePlan,
    kv_scales: torch.Tensor | None,
) -> None:
    """`store_kv` of planned tokens on the CPU."""
    if kv_scales is not None:
        key = to_float8(key, kv_scales[0, :, None]).view(torch.uint8)
        value = to_float8(value, kv_scales[1, :, None]).view(torch.uint8)
        kv_layer = kv_layer.view(torch.uint8)  # few operations take float8
    if plan.tokens is not None:
        key, value = key[plan.tokens], value[plan.tokens]
    if len(plan.block_ids) == 1:  # two plain copies cost a third of a scatter
        slot = kv_layer[int(plan.block_ids), :, :, int(plan.offsets)]
        slot[0].copy_(key[0])
        slot[1].copy_(value[0])
        return
    kv_layer[plan.block_ids, :, :, plan.offsets] = torch.stack((key, value), dim=1)


def _store_kv_triton(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_layer: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_scales: torch.Tensor | None,
) -> None:
    assert key.stride(2) == value.stride(2) == 1
    assert kv_layer.is_contiguous()
    num_tokens, num_kv_heads, head_size = key.shape
    if num_tokens == 0:
        return
    _store_kv_kernel[(num_tokens,)](
        key, value, kv_layer, slot_mapping, key if kv_scales is None else kv_scales,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        SCALED=kv_scales is not None, FLOAT8_MAX=FLOAT8_MAX,
        HEADS=num_kv_heads, HEAD_SIZE=head_size, BLOCK_SIZE=kv_layer.shape[3],
        BLOCK_HEADS=next_power_of_two(num_kv_heads), BLOCK_HEAD_SIZE=next_power_of_two(head_size),
        num_warps=4,
    )  # fmt: skip


@jit
def float8_of(x: tl.tensor, scale: tl.tensor, FLOAT8_MAX: tl.constexpr) -> tl.tensor:
    """As `to_float8`."""
    x = x.to(tl.float32) / scale
    x = tl.clamp(x, -FLOAT8_MAX, FLOAT8_MAX, propagate_nan=tl.PropagateNan.ALL)
    return x.to(tl.float8e4nv)


@jit
def _store_kv_kernel(
    key_ptr: tl.tensor, value_ptr: tl.tensor, kv_ptr: tl.tensor, slots_ptr: tl.tensor,
    scales_ptr: tl.tensor, key_stride: tl.tensor, key_head_stride: tl.tensor,
    value_stride: tl.tensor, value_head_stride: tl.tensor,
    SCALED: tl.constexpr, FLOAT8_MAX: tl.constexpr, HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HEAD_SIZE: tl.constexpr,
) -> None:  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot < 0:
        return
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    column = tl.arange(0, BLOCK_HEAD_SIZE)[None, :]
    mask = (head < HEADS) & (column < HEAD_SIZE)
    block_offset = slot // BLOCK_SIZE * (2 * HEADS * BLOCK_SIZE * HEAD_SIZE)
    target_ptr = (
        kv_ptr + block_offset + (head * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_SIZE + column
    )
    key = tl.load(key_ptr + token * key_stride + head * key_head_stride + column, mask=mask)
    value = tl.load(value_ptr + token * value_stride + head * value_head_stride + column, mask=mask)
    if SCALED:
        key_scale = tl.load(scales_ptr + head, mask=head < HEADS, other=1.0)
        value_scale = tl.load(scales_ptr + HEADS + head, mask=head < HEADS, other=1.0)
        key = float8_of(key, key_scale, FLOAT8_MAX)
        value = float8_of(value, value_scale, FLOAT8_MAX)
    tl.store(target_ptr, key, mask=mask)
    tl.store(target_ptr + HEADS * BLOCK_SIZE * HEAD_SIZE, value, mask=mask)
