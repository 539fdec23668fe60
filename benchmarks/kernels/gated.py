"""The product of gate and up with its activation inside; opponent: the library's and `silu_mul`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.functional import linear

from benchmarks.kernels.inputs import HIDDEN, INTERMEDIATE, normal
from benchmarks.kernels.timing import Call, Case
from kernels.gated_linear import gated_linear
from kernels.silu_mul import silu_mul
from kernels.thin_gated_linear import thin_gated_linear

if TYPE_CHECKING:
    from collections.abc import Iterator


def cases() -> Iterator[Case]:
    for num_tokens in (32, 64, 128, 2048, 8192):
        yield gated_case(num_tokens)


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
