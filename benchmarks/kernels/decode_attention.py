"""Paged decode attention; opponent: cuDNN over contiguous keys and values, where lengths agree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.kernels.inputs import (
    HEAD_SIZE,
    HEADS,
    KV_HEADS,
    KV_TOKEN_BYTES,
    SCALE,
    normal,
    paged_kv,
)
from benchmarks.kernels.timing import Call, Case
from kernels.paged_attention import paged_attention

if TYPE_CHECKING:
    from collections.abc import Iterator


def cases() -> Iterator[Case]:
    yield decode_case("64 x 512", [512] * 64)
    yield decode_case("32 x 4096", [4096] * 32)
    yield decode_case("64 x 4096", [4096] * 64)
    yield decode_case("8 x 32768", [32768] * 8)
    yield decode_case("1 x 131072", [131072])
    yield decode_case("1 x 32768 + 63 x 1024", [32768] + [1024] * 63)
    yield decode_case("64 x 1520, the same bytes", [1520] * 64)
    yield decode_case("1 x 131072 + 31 x 4096", [131072] + [4096] * 31)
    yield decode_case("32 x 8064, the same bytes", [8064] * 32)


def decode_case(name: str, seq_lens: list[int]) -> Case:
    def make() -> Call:
        kv_layer, tables, lengths = paged_kv(seq_lens)
        query = normal(len(seq_lens), HEADS, HEAD_SIZE)
        out = torch.empty_like(query)
        return lambda: paged_attention(query, kv_layer, tables, lengths, scale=SCALE, out=out)

    def make_peer() -> Call:
        query = normal(len(seq_lens), HEADS, 1, HEAD_SIZE)
        key, value = (normal(len(seq_lens), KV_HEADS, seq_lens[0], HEAD_SIZE) for _ in range(2))

        def call() -> torch.Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return scaled_dot_product_attention(query, key, value, enable_gqa=True)

        return call

    even = len(set(seq_lens)) == 1
    return Case(
        f"paged_attention {name}",
        make,
        num_bytes=sum(seq_lens) * KV_TOKEN_BYTES,
        peer="cuDNN, contiguous" if even else "",
        make_peer=make_peer if even else None,
    )
