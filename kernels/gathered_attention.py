"""Attention over paged KV on the CPU: what both attention kernels' references run.

For each group of a plan: gather its blocks into dense keys and values, zero what belongs to no
sequence, then per step of queries two batched matrix products with a softmax between them.

KV in float8 is widened as it is gathered. Its scales are of whole heads, so queries are multiplied
by those of the keys and results by those of the values, which are fewer than keys and values.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kernels.attention_plan import AttentionPlan
    from kernels.attention_steps import QueryStep

# By code; looking up is five times faster than torch's own conversion on a CPU.
_FLOAT8_VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def gathered_attention(
    query: torch.Tensor,
    kv_layer: torch.Tensor,
    plan: AttentionPlan,
    *,
    scale: float,
    out: torch.Tensor,
    kv_scales: torch.Tensor | None = None,
) -> None:
    """Causal attention of the last query tokens of every sequence, written to `out`.

    Tensors as in `prefill_attention`. What no planned sequence owns is left as it was.
    """
    if plan.empty_rows is not None:
        out[plan.empty_rows] = 0
    _, _, num_kv_heads, block_size, head_size = kv_layer.shape
    blocks = kv_layer.view(-1, block_size * head_size)
    for group in plan.groups:
        gathered = _gather(blocks, group.rows)
        if group.in_float:
            gathered = gathered.float()
        scales = None
        if kv_scales is not None:
            scales = kv_scales.repeat(1, group.members).view(2, -1, 1, 1)
        key, value = gathered.view(2, group.members * num_kv_heads, -1, head_size).unbind(0)
        if group.tails is not None:
            value.view(-1, head_size).index_fill_(0, group.tails, 0)
        for step in group.steps:
            _attend(query, key, value, scales, group.members, step, scale, out)


def _gather(blocks: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows of the pool; those in float8 as float32."""
    if blocks.dtype != torch.float8_e4m3fn:
        return blocks.index_select(0, rows)
    codes = blocks.view(torch.uint8).index_select(0, rows)
    return _FLOAT8_VALUES.index_select(0, codes.view(-1).int()).view(codes.shape)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scales: torch.Tensor | None,
    members: int,
    step: QueryStep,
    scale: float,
    out: torch.Tensor,
) -> None:
    products, _, head_size = key.shape
    if step.num_queries == 1 and isinstance(step.tokens, slice):
        # The heads of one query token lie as the products need them.
        packed = query[step.tokens].reshape(products, -1, head_size).to(key.dtype)
        result = _weigh(packed, key, value, scales, members, step, scale)
        out[step.tokens].view(products, -1, head_size).copy_(result)
        return
    shape = (members, step.num_queries, products // members, -1, head_size)
    # [members, queries, kv heads, group, size] -> [members * kv heads, group * queries, size]
    packed = query[step.tokens].view(shape).permute(0, 2, 3, 1, 4).to(key.dtype)
    packed = packed.reshape(products, -1, head_size)
    result = _weigh(packed, key, value, scales, members, step, scale)
    result = result.view(members, shape[2], -1, step.num_queries, head_size)
    result = result.permute(0, 3, 1, 2, 4)
    if isinstance(step.tokens, slice):
        out[step.tokens].view(shape).copy_(result)
    else:
        flat = result.reshape(*step.tokens.shape, out.shape[1], head_size)
        out[step.tokens] = flat.to(out.dtype)


def _weigh(
    packed: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scales: torch.Tensor | None,
    members: int,
    step: QueryStep,
    scale: float,
) -> torch.Tensor:
    """Weighted values `[products, group * queries, head_size]` of queries of the same shape.

    scales: float32 `[2, products, 1, 1]`, what stored keys and values are to be multiplied by.
    """
    if scales is not None:
        packed = packed * scales[0]
    key, value = key[:, : step.num_keys], value[:, : step.num_keys]
    nothing = packed.new_empty(1, 1, 1)  # beta 0: it is not read
    scores = torch.baddbmm(nothing, packed, key.mT, beta=0, alpha=scale)
    if step.hidden is not None:
        by_member = scores.view(members, -1, step.num_queries, step.num_keys)
        by_member[..., step.seen :].masked_fill_(step.hidden, -math.inf)
    weighted = torch.bmm(torch.softmax(scores, dim=-1), value)
    return weighted if scales is None else weighted * scales[1]
