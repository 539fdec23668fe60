"""Matrix products of one layer and of the head.

Few rows run as a decode step runs them: the norm in front of qkv, gate_up and head, the gate behind
gate_up and the residual behind output and down are part of the call. The opponent is the library's
bare product in bfloat16, which has none of these. Many rows are the library's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear

from benchmarks.kernels.inputs import (
    HEAD_SIZE,
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    KV_HEADS,
    VOCABULARY,
    normal,
)
from benchmarks.kernels.timing import Call, Case
from kernels.fp8_linear import fp8_linear, quantize_weight
from kernels.int4_linear import int4_linear
from kernels.int4_packing import pack_codes
from kernels.skinny_linear import skinny_linear, skinny_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Product = Callable[..., torch.Tensor]

# Name: rows and columns of the weight.
WEIGHTS = {
    "qkv": ((HEADS + 2 * KV_HEADS) * HEAD_SIZE, HIDDEN),
    "output": (HIDDEN, HEADS * HEAD_SIZE),
    "gate_up": (2 * INTERMEDIATE, HIDDEN),
    "down": (HIDDEN, INTERMEDIATE),
    "head": (VOCABULARY, HIDDEN),
}
GROUP_SIZE = 128
# Bytes of a weight, scales included.
WEIGHT_BYTES = {"bf16": 2.0, "fp8": 1.0, "int4": 0.5 + 4 / GROUP_SIZE}


def cases() -> Iterator[Case]:
    for num_tokens in (1, 4, 8):
        for name in WEIGHTS:
            yield skinny_case(name, "bf16", num_tokens)
    for kind, counts in (("fp8", (1, 8, 32, 256)), ("int4", (1, 8, 16))):
        for num_tokens in counts:
            for name in WEIGHTS:
                if name != "head":
                    yield skinny_case(name, kind, num_tokens)
    for num_tokens in (16, 32, 128, 256, 8192):
        for name in WEIGHTS:
            if name != "head" or num_tokens <= 256:
                yield library_case(name, num_tokens)
    yield fp8_case("gate_up", 8192)


def skinny_case(name: str, kind: str, num_tokens: int) -> Case:
    rows, columns = WEIGHTS[name]

    def make() -> Call:
        x = normal(num_tokens, columns)
        product = PRODUCTS[kind](rows, columns)
        gated = name == "gate_up"
        if name in ("output", "down"):
            residual = normal(num_tokens, rows)
            return lambda: product(x, residual=residual)
        norm_weight = normal(columns)
        return lambda: product(x, norm_weight=norm_weight, eps=1e-5, silu_mul=gated)

    return Case(
        f"{kind} {name} as in a decode step, {num_tokens} tokens",
        make,
        num_bytes=int(WEIGHT_BYTES[kind] * rows * columns) + 2 * num_tokens * (rows + columns),
        num_flops=2 * num_tokens * rows * columns,
        peer="library, bf16, product alone",
        make_peer=lambda: library_call(name, num_tokens),
    )


def plain_product(rows: int, columns: int) -> Product:
    weight = normal(rows, columns)
    return lambda x, **around: skinny_linear(x, weight, **around)


def fp8_product(rows: int, columns: int) -> Product:
    """Inputs are quantised where there are more of them than widening weights pays for."""
    weight, scale = quantize_weight(normal(rows, columns))

    def product(x: torch.Tensor, **around: Any) -> torch.Tensor:
        if len(x) <= skinny_rows(weight):
            return skinny_linear(x, weight, weight_scale=scale, **around)
        return fp8_linear(x, weight, scale, **around)

    return product


def int4_product(rows: int, columns: int) -> Product:
    device = normal(1).device
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, device=device)
    scales = normal(columns // GROUP_SIZE, rows).abs().div(100)
    zeros = torch.randint(1, 16, scales.shape, device=device)
    weight = pack_codes(codes, scales, zeros, dtype=scales.dtype)
    return lambda x, **around: int4_linear(x, weight, **around)


PRODUCTS = {"bf16": plain_product, "fp8": fp8_product, "int4": int4_product}


def library_call(name: str, num_tokens: int) -> Call:
    rows, columns = WEIGHTS[name]
    x, weight = normal(num_tokens, columns), normal(rows, columns)
    return lambda: linear(x, weight)


def library_case(name: str, num_tokens: int) -> Case:
    rows, columns = WEIGHTS[name]
    return Case(
        f"linear {name} (library), {num_tokens} tokens",
        lambda: library_call(name, num_tokens),
        num_bytes=2 * (rows * columns + num_tokens * (rows + columns)),
        num_flops=2 * num_tokens * rows * columns,
    )


def fp8_case(name: str, num_tokens: int) -> Case:
    """Activations quantised row by row, then the library's product in FP8."""
    rows, columns = WEIGHTS[name]

    def make() -> Call:
        weight, scale = quantize_weight(normal(rows, columns))
        x = normal(num_tokens, columns)
        return lambda: fp8_linear(x, weight, scale)

    return Case(
        f"fp8 {name} with quantised activations, {num_tokens} tokens",
        make,
        num_bytes=rows * columns + 2 * num_tokens * (rows + columns),
        num_flops=2 * num_tokens * rows * columns,
        peer="library, bf16",
        make_peer=lambda: library_call(name, num_tokens),
    )
