"""What stands between the qkv product of a layer and its attention, as one kernel.

1. Queries and keys are normed head by head, where the model does that (Qwen3).
2. Both turn by their position: rotary embedding, rotate-half style, element i of a head with
   element i + head_size / 2.
3. Keys and values go into their slots of the layer's KV blocks; a pool in float8_e4m3fn takes
   them divided by their head's scale and saturated.
4. Queries stay where they are, turned.

On a GPU a program does this for some heads of one token: each element is read once and written
once. On a CPU the parts are calls of torch over all tokens, and what is the same in all layers of
a step is worked out once, by `plan_tokens`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels.dispatch import (
    chained_launch,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    next_power_of_two,
    runs_triton,
    tl,
)
from kernels.rms_norm import rms_norm

FLOAT8_MAX = 448.0  # of float8_e4m3fn

# Heads of a program: few where few tokens must fill the GPU, more where there are enough.
_FEW_HEADS, _MANY_HEADS = 4, 16
_FEW_TOKENS = 512


class TokenPlan(NamedTuple):
    """What a step's tokens have in common in all layers, as the CPU wants it.

    `stored`: which tokens are, None for all. `block_ids`, `offsets`: int64, one for each of them.
    `cos`: float32 `[num_tokens, 1, 1, head_size / 2]`. `signed_sin`: float32 `[num_tokens, 1, 2,
    head_size / 2]`, negative, then positive.
    """

    stored: torch.Tensor | None
    block_ids: torch.Tensor
    offsets: torch.Tensor
    cos: torch.Tensor
    signed_sin: torch.Tensor


def plan_tokens(
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_size: int,
) -> TokenPlan:
    """What `rope_store` would work out anew in each layer. For tensors on the CPU."""
    half = cos_sin_cache.shape[1] // 2
    rows = cos_sin_cache.index_select(0, positions).view(len(positions), 1, 2, half)
    cos, sin = rows[:, :, :1], rows[:, :, 1:]
    slots = slot_mapping.long()
    kept = slots >= 0
    stored = None
    if not kept.all():
        stored = kept.nonzero().squeeze(1)
        slots = slots[stored]
    signed_sin = torch.cat((-sin, sin), dim=2)
    return TokenPlan(stored, slots // block_size, slots % block_size, cos, signed_sin)


def rope_store(
    qkv: torch.Tensor,
    kv_layer: torch.Tensor,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    *,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    kv_scales: torch.Tensor | None = None,
    plan: TokenPlan | None = None,
) -> torch.Tensor:
    """Stores token i's key and value at slot `slot_mapping[i]`; returns the queries.

    qkv: `[num_tokens, (num_heads + 2 * num_kv_heads) * head_size]`, contiguous; overwritten.
    kv_layer: `[num_blocks, 2, num_kv_heads, block_size, head_size]`, contiguous, in qkv's dtype
    unless that is float8_e4m3fn. slot_mapping: int32 or int64 `[num_tokens]`, block_id * block_size
    + offset, none twice; -1 stores nothing. positions: int32 or int64 `[num_tokens]`.
    cos_sin_cache: float32 `[max_len, head_size]`, contiguous; a row holds head_size / 2 cosines,
    then as many sines. q_norm, k_norm: `[head_size]`, both or none, with eps. kv_scales: of a
    float8 kv_layer, float32 `[2, num_kv_heads]`, what keys and values are divided by. plan: what
    `plan_tokens` made of the same step; spares the CPU to make it anew in each layer.

    Queries: `[num_tokens, num_heads, head_size]`, a view of qkv on a GPU. Computed in float32.
    """
    _, _, num_kv_heads, block_size, head_size = kv_layer.shape
    num_heads = qkv.shape[1] // head_size - 2 * num_kv_heads
    assert qkv.is_contiguous()
    assert qkv.shape[1] == (num_heads + 2 * num_kv_heads) * head_size
    assert cos_sin_cache.dtype == torch.float32
    assert cos_sin_cache.shape[1] == head_size
    assert (q_norm is None) == (k_norm is None)
    assert (qkv.dtype == kv_layer.dtype) == (kv_scales is None)
    heads = qkv.view(-1, num_heads + 2 * num_kv_heads, head_size)
    norms = None if q_norm is None or k_norm is None else (q_norm, k_norm, eps)
    if runs_triton(qkv):
        _rope_store_triton(
            heads, kv_layer, slot_mapping, positions, cos_sin_cache, norms, kv_scales
        )
        return heads[:, :num_heads]
    plan = plan or plan_tokens(positions, cos_sin_cache, slot_mapping, block_size)
    return _rope_store_reference(heads, kv_layer, plan, norms, kv_scales)


def _rope_store_reference(
    heads: torch.Tensor,
    kv_layer: torch.Tensor,
    plan: TokenPlan,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None,
    kv_scales: torch.Tensor | None,
) -> torch.Tensor:
    num_kv_heads = kv_layer.shape[2]
    num_heads = heads.shape[1] - 2 * num_kv_heads
    query, key, value = heads.split_with_sizes([num_heads, num_kv_heads, num_kv_heads], dim=1)
    if norms is None:
        _rotate(heads[:, : num_heads + num_kv_heads], plan)
    else:
        q_norm, k_norm, eps = norms
        query, key = rms_norm(query, q_norm, eps), rms_norm(key, k_norm, eps)
        _rotate(query, plan)
        _rotate(key, plan)
    _store(key, value, kv_layer, plan, kv_scales)
    return query


def _rotate(x: torch.Tensor, plan: TokenPlan) -> None:
    """Turns `[num_tokens, heads, head_size]` in place."""
    halves = x.view(*x.shape[:-1], 2, x.shape[-1] // 2)
    wide = halves.float()
    turned = torch.mul(wide, plan.cos).addcmul_(wide.flip(2), plan.signed_sin)
    halves.copy_(turned)


def _store(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_layer: torch.Tensor,
    plan: TokenPlan,
    kv_scales: torch.Tensor | None,
) -> None:
    if kv_scales is not None:
        key = _to_float8(key, kv_scales[0, :, None]).view(torch.uint8)
        value = _to_float8(value, kv_scales[1, :, None]).view(torch.uint8)
        kv_layer = kv_layer.view(torch.uint8)  # few operations take float8
    if plan.stored is not None:
        key, value = key[plan.stored], value[plan.stored]
    if len(plan.block_ids) == 1:  # two plain copies cost a third of a scatter
        slot = kv_layer[int(plan.block_ids), :, :, int(plan.offsets)]
        slot[0].copy_(key[0])
        slot[1].copy_(value[0])
        return
    kv_layer[plan.block_ids, :, :, plan.offsets] = torch.stack((key, value), dim=1)


def _to_float8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x / scale, saturated; NaN stays NaN."""
    return (x.float() / scale).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn)


def _rope_store_triton(
    heads: torch.Tensor,
    kv_layer: torch.Tensor,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None,
    kv_scales: torch.Tensor | None,
) -> None:
    assert kv_layer.is_contiguous()
    assert cos_sin_cache.is_contiguous()
    num_tokens, num_all, head_size = heads.shape
    num_kv_heads = kv_layer.shape[2]
    num_heads = num_all - 2 * num_kv_heads
    if num_tokens == 0:
        return
    most = _FEW_HEADS if num_tokens <= _FEW_TOKENS else _MANY_HEADS
    group = min(most, next_power_of_two(num_heads))
    kv_group = min(most, next_power_of_two(num_kv_heads))
    groups = -(-num_heads // group) + 2 * -(-num_kv_heads // kv_group)
    q_norm, k_norm, eps = norms or (heads, heads, 0.0)
    chained = chained_launch(heads.device)
    _rope_store_kernel[(groups, num_tokens)](
        heads, kv_layer, slot_mapping, positions, cos_sin_cache, q_norm, k_norm,
        heads if kv_scales is None else kv_scales, eps,
        NORMED=norms is not None, SCALED=kv_scales is not None, FLOAT8_MAX=FLOAT8_MAX,
        HEADS=num_heads, KV_HEADS=num_kv_heads, HALF=head_size // 2,
        BLOCK_SIZE=kv_layer.shape[3], BLOCK_HALF=next_power_of_two(head_size // 2),
        GROUP=group, KV_GROUP=kv_group, CHAINED=chained, num_warps=1 if most == _FEW_HEADS else 4,
        launch_pdl=chained,
    )  # fmt: skip


@jit
def _rope_store_kernel(
    qkv_ptr: tl.tensor, kv_ptr: tl.tensor, slots_ptr: tl.tensor, positions_ptr: tl.tensor,
    cos_sin_ptr: tl.tensor, q_norm_ptr: tl.tensor, k_norm_ptr: tl.tensor, scales_ptr: tl.tensor,
    eps: tl.tensor, NORMED: tl.constexpr, SCALED: tl.constexpr, FLOAT8_MAX: tl.constexpr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_HALF: tl.constexpr, GROUP: tl.constexpr, KV_GROUP: tl.constexpr, CHAINED: tl.constexpr,
) -> None:  # fmt: skip
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    HEAD_SIZE: tl.constexpr = 2 * HALF
    QUERY_GROUPS: tl.constexpr = (HEADS + GROUP - 1) // GROUP
    KV_GROUPS: tl.constexpr = (KV_HEADS + KV_GROUP - 1) // KV_GROUP
    group = tl.program_id(0)
    token = tl.program_id(1).to(tl.int64)
    token_ptr = qkv_ptr + token * ((HEADS + 2 * KV_HEADS) * HEAD_SIZE)
    column = tl.arange(0, BLOCK_HALF)[None, :]
    if group < QUERY_GROUPS:
        head = group * GROUP + tl.arange(0, GROUP)[:, None]
        mask = (head < HEADS) & (column < HALF)
        head_ptr = token_ptr + head * HEAD_SIZE + column
        first, second = _turned(
            head_ptr, mask, column, token, positions_ptr, cos_sin_ptr, q_norm_ptr, eps,
            NORMED, HALF,
        )  # fmt: skip
        tl.store(head_ptr, first.to(qkv_ptr.dtype.element_ty), mask=mask)
        tl.store(head_ptr + HALF, second.to(qkv_ptr.dtype.element_ty), mask=mask)
        return
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot < 0:
        return
    group -= QUERY_GROUPS
    side = group // KV_GROUPS
    head = group % KV_GROUPS * KV_GROUP + tl.arange(0, KV_GROUP)[:, None]
    mask = (head < KV_HEADS) & (column < HALF)
    head_ptr = token_ptr + (HEADS + side * KV_HEADS + head) * HEAD_SIZE + column
    if side == 0:
        first, second = _turned(
            head_ptr, mask, column, token, positions_ptr, cos_sin_ptr, k_norm_ptr, eps,
            NORMED, HALF,
        )  # fmt: skip
    else:
        first = tl.load(head_ptr, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(head_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
    if SCALED:
        scale = tl.load(scales_ptr + side * KV_HEADS + head, mask=head < KV_HEADS, other=1.0)
        first = _float8_of(first, scale, FLOAT8_MAX)
        second = _float8_of(second, scale, FLOAT8_MAX)
    row = ((slot // BLOCK_SIZE * 2 + side) * KV_HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE
    target_ptr = kv_ptr + row * HEAD_SIZE + column
    tl.store(target_ptr, first.to(kv_ptr.dtype.element_ty), mask=mask)
    tl.store(target_ptr + HALF, second.to(kv_ptr.dtype.element_ty), mask=mask)


@jit
def _turned(
    head_ptr: tl.tensor, mask: tl.tensor, column: tl.tensor, token: tl.tensor,
    positions_ptr: tl.tensor, cos_sin_ptr: tl.tensor, norm_ptr: tl.tensor, eps: tl.tensor,
    NORMED: tl.constexpr, HALF: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Both halves of some heads of one token, normed and rotated, in float32."""
    row_ptr = cos_sin_ptr + tl.load(positions_ptr + token).to(tl.int64) * (2 * HALF) + column
    cos = tl.load(row_ptr, mask=column < HALF, other=0.0)
    sin = tl.load(row_ptr + HALF, mask=column < HALF, other=0.0)
    first = tl.load(head_ptr, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(head_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
    if NORMED:
        total = tl.sum(first * first + second * second, axis=1)[:, None]
        scale = 1.0 / tl.sqrt_rn(total / (2 * HALF) + eps)
        weight = tl.load(norm_ptr + column, mask=column < HALF, other=0.0).to(tl.float32)
        first = first * scale * weight
        weight = tl.load(norm_ptr + HALF + column, mask=column < HALF, other=0.0).to(tl.float32)
        second = second * scale * weight
    return first * cos - second * sin, second * cos + first * sin


@jit
def _float8_of(x: tl.tensor, scale: tl.tensor, FLOAT8_MAX: tl.constexpr) -> tl.tensor:
    """As `_to_float8`."""
    x = tl.clamp(x / scale, -FLOAT8_MAX, FLOAT8_MAX, propagate_nan=tl.PropagateNan.ALL)
    return x.to(tl.float8e4nv)
