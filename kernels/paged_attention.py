"""Decode attention: one query token per sequence over its paged keys and values.

1. What all layers of a step have in common is planned once: on the CPU by `attention_plan.py`, on a
   GPU, inside the step's CUDA graph, by `decode_plan.py`.
2. On the CPU `gathered_attention.py` copies blocks together and multiplies matrices.
3. On a GPU `split_attention.py` walks the blocks where they lie, all programs equally long.
"""

from __future__ import annotations

import torch

from kernels.attention_plan import AttentionPlan, plan_decode
from kernels.decode_plan import SplitPlan, plan_splits
from kernels.dispatch import runs_triton
from kernels.gathered_attention import gathered_attention
from kernels.split_attention import split_attention


def paged_attention(
    query: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    out: torch.Tensor | None = None,
    sliding_window: int | None = None,
    plan: AttentionPlan | SplitPlan | None = None,
    kv_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of each sequence's newest token, whose key and value are already stored.

    query: `[num_seqs, num_heads, head_size]`, last dimension contiguous. kv_layer: `[num_blocks, 2,
    num_kv_heads, block_size, head_size]`, contiguous, in query's dtype or float8_e4m3fn (then
    head_size is even); block_size a power of two.
    block_tables: int32 `[num_seqs, max_blocks]`; entries past a sequence's last block are not
    read. seq_lens: int32 `[num_seqs]`, the current token included; a row of length 0 (padding)
    gives zeros. With a sliding_window of w a token sees itself and the w - 1 before it.
    plan: what `plan_decode` (on the CPU) or `plan_splits` (on a GPU) made of the same tables,
    lengths and window; spares to make it anew in each layer. kv_scales: float32 `[2, num_kv_heads]`
    where kv_layer is float8_e4m3fn, what its keys and values are to be multiplied by. Returns out,
    `[num_seqs, num_heads, head_size]` contiguous.
    """
    if out is None:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    assert query.dtype == out.dtype
    assert (kv_layer.dtype == query.dtype) == (kv_scales is None)
    assert kv_layer.is_contiguous()
    assert out.is_contiguous()
    if runs_triton(query):
        if len(query) > 0:
            if plan is None:
                plan = plan_splits(seq_lens, kv_layer, sliding_window=sliding_window)
            assert isinstance(plan, SplitPlan)
            assert plan.sliding_window == sliding_window
            split_attention(
                query, kv_layer, block_tables, seq_lens, plan,
                scale=scale, out=out, kv_scales=kv_scales,
            )  # fmt: skip
        return out
    if plan is None:
        plan = plan_decode(
            block_tables, seq_lens, kv_layer,
            num_heads=query.shape[1], sliding_window=sliding_window,
        )  # fmt: skip
    assert isinstance(plan, AttentionPlan)
    gathered_attention(query, kv_layer, plan, scale=scale, out=out, kv_scales=kv_scales)
    return out
