"""Kernels that move rows: norms, rotary, stores, activations, and those of the hand-off."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from benchmarks.kernels.inputs import (
    BLOCK_SIZE,
    DEVICE,
    HEAD_SIZE,
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    KV_HEADS,
    KV_TOKEN_BYTES,
    normal,
)
from benchmarks.kernels.timing import Call, Case
from kernels.block_digest import block_digests
from kernels.copy_blocks import pack_blocks, unpack_blocks
from kernels.rms_norm import rms_norm
from kernels.rope_store import rope_store
from kernels.silu_mul import silu_mul

if TYPE_CHECKING:
    from collections.abc import Iterator


def cases() -> Iterator[Case]:
    for num_tokens in (8192, 64, 1):
        yield from token_cases(num_tokens)
    yield from block_cases(4, 512)
    yield from block_cases(1, 128)


def token_cases(num_tokens: int) -> Iterator[Case]:
    """The kernels that work token by token."""
    heads = HEADS + 2 * KV_HEADS
    positions = torch.randint(0, 4096, (num_tokens,), device=DEVICE)
    cos_sin = torch.randn(4096, HEAD_SIZE, device=DEVICE)
    num_slots = max(1, 4 * num_tokens // BLOCK_SIZE) * BLOCK_SIZE
    slots = torch.randperm(num_slots)[:num_tokens].to(DEVICE)

    def norm() -> Call:
        x, weight = normal(num_tokens, HIDDEN), normal(HIDDEN)
        return lambda: rms_norm(x, weight, 1e-5)

    def rope(is_float8: bool) -> Call:
        qkv = normal(num_tokens, heads * HEAD_SIZE)
        num_blocks = max(1, 4 * num_tokens // BLOCK_SIZE)
        kv_layer = normal(num_blocks, 2, KV_HEADS, BLOCK_SIZE, HEAD_SIZE)
        scales = None
        if is_float8:
            kv_layer = kv_layer.to(torch.float8_e4m3fn)
            scales = torch.ones(2, KV_HEADS, device=DEVICE)
        return lambda: rope_store(qkv, kv_layer, slots, positions, cos_sin, kv_scales=scales)

    def silu() -> Call:
        gate_up = normal(num_tokens, 2 * INTERMEDIATE)
        return lambda: silu_mul(gate_up)

    row = 2 * num_tokens
    suffix = f"{num_tokens} tokens"
    yield Case(f"rms_norm, {suffix}", norm, num_bytes=2 * HIDDEN * row)
    rope_bytes = 2 * heads * HEAD_SIZE * row
    yield Case(f"rope_store, {suffix}", lambda: rope(False), num_bytes=rope_bytes)
    saved = num_tokens * KV_TOKEN_BYTES // 2
    yield Case(f"rope_store to fp8, {suffix}", lambda: rope(True), num_bytes=rope_bytes - saved)
    yield Case(f"silu_mul, {suffix}", silu, num_bytes=3 * INTERMEDIATE * row)


def block_cases(num_layers: int, num_ids: int) -> Iterator[Case]:
    """The kernels of the hand-off, over a pool four times as large as what is moved."""
    unit = KV_TOKEN_BYTES * BLOCK_SIZE
    packed_bytes = num_layers * num_ids * unit

    def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        pool = normal(num_layers, 4 * num_ids, unit // 2).view(torch.uint8)
        packed = normal(num_layers, num_ids, unit // 2).view(torch.uint8)
        return pool, packed, torch.randperm(4 * num_ids)[:num_ids].to(DEVICE)

    def pack() -> Call:
        pool, packed, ids = inputs()
        return lambda: pack_blocks(pool, 0, num_layers, ids, packed)

    def unpack() -> Call:
        pool, packed, ids = inputs()
        return lambda: unpack_blocks(packed, pool, 0, num_layers, ids)

    def digest() -> Call:
        _, packed, _ = inputs()
        return lambda: block_digests(packed, num_layers * num_ids)

    suffix = f"{packed_bytes >> 20} MiB"
    yield Case(f"pack_blocks, {suffix}", pack, num_bytes=2 * packed_bytes)
    yield Case(f"unpack_blocks, {suffix}", unpack, num_bytes=2 * packed_bytes)
    yield Case(f"block_digests, {suffix}", digest, num_bytes=packed_bytes)
