"""Products of more rows than `skinny_linear` takes. Opponent: the library and what stands behind.

The product of gate and up has its activation inside, the smaller ones their residual.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.functional import linear

from benchmarks.kernels.inputs import HEAD_SIZE, HEADS, HIDDEN, INTERMEDIATE, KV_HEADS, normal
from benchmarks.kernels.timing import Call, Case
from kernels.gated_linear import gated_linear
from kernels.silu_mul import silu_mul
from kernels.thin_gated_linear import thin_gated_linear
from kernels.thin_linear import thin_linear

if TYPE_CHECKING:
    from collections.abc import Iterator


# Outputs and inputs of the smaller matrices of a layer.
SMALLER = {
    "qkv": ((HEADS + 2 * KV_HEADS) * HEAD_SIZE, HIDDEN),
    "output": (HIDDEN, HEADS * HEAD_SIZE),
    "down": (HIDDEN, INTERMEDIATE),
}


def cases() -> Iterator[Case]:
    for num_tokens in (32, 64, 128, 256, 2048, 8192):
        yield gated_case(num_tokens)
    for name in SMALLER:
        yield thin_case(name, 32)


def thin_case(name: str, num_tokens: int) -> Case:
    out_size, in_size = SMALLER[name]

    def make() -> Call:
        x, weight = normal(num_tokens, in_size), normal(out_size, in_size)
        residual = normal(num_tokens, out_size)
        return lambda: thin_linear(x, weight, residual=residual)

    def make_peer() -> Call:
        x, weight = normal(num_tokens, in_size), normal(out_size, in_size)
        residual = normal(num_tokens, out_size)
        return lambda: residual.addmm_(x, weight.t())

    return Case(
        f"thin_linear {name}, {num_tokens} tokens",
        make,
        num_bytes=2 * (out_size * in_size + num_tokens * (in_size + 2 * out_size)),
        num_flops=2 * num_tokens * out_size * in_size,
        peer="library",
        make_peer=make_peer,
    )


def gated_case(num_tokens: int) -> Case:
    product = thin_gated_linear if num_tokens <= 128 else gated_linear

    def make() -> Call:
        x, weight = normal(num_tokens, HIDDEN), normal(2 * INTERMEDIATE, HIDDEN)
        return lambda: product(x, weight)

    def make_peer() -> Call:
        x, weight = normal(num_tokens, HIDDEN), normal(2 * INTERMEDIATE, HIDDEN)
        return lambda: silu_mul(linear(x, weight))

    return Case(
        f"{product.__name__}, {num_tokens} tokens",
        make,
        num_bytes=2 * (2 * INTERMEDIATE * HIDDEN + num_tokens * (HIDDEN + INTERMEDIATE)),
        num_flops=2 * num_tokens * HIDDEN * 2 * INTERMEDIATE,
        peer="library and silu_mul",
        make_peer=make_peer,
    )
