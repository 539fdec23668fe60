"""Paged decode attention; opponent: cuDNN over contiguous keys and values, where lengths agree.

A call is one layer's: what is planned once per step and read by all layers is timed apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.kernels.inputs import (
    BLOCK_SIZE,
    DEVICE,
    HEAD_SIZE,
    HEADS,
    KV_HEADS,
    KV_TOKEN_BYTES,
    SCALE,
    normal,
    paged_kv,
)
from benchmarks.kernels.timing import Call, Case
from kernels.decode_plan import plan_splits
from kernels.paged_attention import paged_attention

if TYPE_CHECKING:
    from collections.abc import Iterator

# Stored keys and values are divided by it: five standard deviations reach half of float8's range.
FLOAT8_SCALE = 5 / 224
# Both kinds of KV, for their ratio.
LONG = {
    "32 x 8192": [8192] * 32,
    "64 x 4096": [4096] * 64,
    "8 x 32768": [32768] * 8,
    "1 x 131072": [131072],
}
SHORT = {
    "1 x 1024": [1024],
    "32 x 1024": [1024] * 32,
    "128 x 1024": [1024] * 128,
    "256 x 1024": [1024] * 256,
    "64 x 512": [512] * 64,
}
UNEVEN = {
    "1 x 32768 + 63 x 1024": [32768] + [1024] * 63,
    "64 x 1520, the same bytes": [1520] * 64,
    "1 x 131072 + 31 x 4096": [131072] + [4096] * 31,
    "32 x 8064, the same bytes": [8064] * 32,
}


def cases() -> Iterator[Case]:
    for name, seq_lens in (LONG | SHORT | UNEVEN).items():
        yield decode_case(name, seq_lens)
    for name, seq_lens in (LONG | SHORT).items():
        yield decode_case(name, seq_lens, is_float8=True)
    yield plan_case(256)


def decode_case(name: str, seq_lens: list[int], *, is_float8: bool = False) -> Case:
    def make() -> Call:
        kv_layer, tables, lengths = paged_kv(seq_lens)
        kv_scales = None
        if is_float8:
            kv_layer = kv_layer.div_(FLOAT8_SCALE).to(torch.float8_e4m3fn)
            kv_scales = torch.full((2, KV_HEADS), FLOAT8_SCALE, device=DEVICE)
        query = normal(len(seq_lens), HEADS, HEAD_SIZE)
        out = torch.empty_like(query)
        plan = plan_splits(lengths, kv_layer, sliding_window=None)
        return lambda: paged_attention(
            query, kv_layer, tables, lengths, scale=SCALE, out=out, plan=plan, kv_scales=kv_scales
        )

    def make_peer() -> Call:
        query = normal(len(seq_lens), HEADS, 1, HEAD_SIZE)
        key, value = (normal(len(seq_lens), KV_HEADS, seq_lens[0], HEAD_SIZE) for _ in range(2))

        def call() -> torch.Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return scaled_dot_product_attention(query, key, value, enable_gqa=True)

        return call

    has_peer = len(set(seq_lens)) == 1 and not is_float8
    return Case(
        f"paged_attention {name}{', FP8 KV' if is_float8 else ''}",
        make,
        num_bytes=sum(seq_lens) * KV_TOKEN_BYTES // (2 if is_float8 else 1),
        peer="cuDNN, contiguous" if has_peer else "",
        make_peer=make_peer if has_peer else None,
    )


def plan_case(num_seqs: int) -> Case:
    def make() -> Call:
        kv_layer = normal(1, 2, KV_HEADS, BLOCK_SIZE, HEAD_SIZE)
        lengths = torch.full((num_seqs,), 1024, dtype=torch.int32, device=DEVICE)
        return lambda: plan_splits(lengths, kv_layer, sliding_window=None)

    return Case(f"plan_splits {num_seqs} x 1024, once per step", make, num_bytes=4 * num_seqs)
