"""Paged prefill attention by each kernel; opponent: cuDNN over contiguous keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.kernels.inputs import (
    DEVICE,
    HEAD_SIZE,
    HEADS,
    KV_HEADS,
    SCALE,
    normal,
    paged_kv,
)
from benchmarks.kernels.timing import Call, Case
from kernels.attention_backend import BACKENDS, Facts, obstacles
from kernels.prefill_attention import prefill_attention
from kernels.prefill_tiles import plan_tiles

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kernels.attention_backend import AttentionBackend


def cases() -> Iterator[Case]:
    for backend in backends():
        for num_tokens in (2048, 8192, 32768):
            yield prefill_case(backend, num_tokens, 0)
        yield prefill_case(backend, 512, 0, num_seqs=16)
        yield prefill_case(backend, 2048, 0, num_seqs=4)
        yield prefill_case(backend, 2048, 30720)
        yield prefill_case(backend, 64, 8192)


def backends() -> list[AttentionBackend]:
    """The kernels that run here, the fastest first."""
    facts = Facts(torch.cuda.get_device_capability(), torch.bfloat16, HEAD_SIZE)
    return [backend for backend in BACKENDS if not obstacles(backend, facts)]


def attention_flops(num_tokens: int, prefix: int) -> int:
    pairs = num_tokens * prefix + num_tokens * (num_tokens + 1) // 2
    return 4 * HEADS * HEAD_SIZE * pairs


def prefill_case(
    backend: AttentionBackend, num_tokens: int, prefix: int, num_seqs: int = 1
) -> Case:
    def make() -> Call:
        kv_layer, tables, lengths = paged_kv([prefix + num_tokens] * num_seqs)
        query = normal(num_tokens * num_seqs, HEADS, HEAD_SIZE)
        starts = torch.arange(num_seqs + 1, dtype=torch.int32, device=DEVICE) * num_tokens
        out = torch.empty_like(query)
        # Made once for all layers of a step.
        tiles = plan_tiles(starts, lengths, len(query))
        return lambda: prefill_attention(
            query,
            kv_layer,
            tables,
            starts,
            lengths,
            max_seqlen_q=num_tokens,
            scale=SCALE,
            out=out,
            plan=tiles,
            backend=backend,
        )

    has_peer = prefix == 0
    return Case(
        f"prefill_attention {backend} {num_seqs} x {num_tokens} after {prefix}",
        make,
        num_flops=num_seqs * attention_flops(num_tokens, prefix),
        peer="cuDNN, contiguous" if has_peer else "",
        make_peer=(lambda: cudnn_call(num_seqs, num_tokens)) if has_peer else None,
    )


def cudnn_call(num_seqs: int, num_tokens: int) -> Call:
    query = normal(num_seqs, HEADS, num_tokens, HEAD_SIZE)
    key, value = (normal(num_seqs, KV_HEADS, num_tokens, HEAD_SIZE) for _ in range(2))

    def call() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    return call
