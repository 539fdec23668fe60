"""Matrix products of one layer and of the head.

Few rows run as a decode step runs them: the norm in front of qkv, gate_up and head, the gate behind
gate_up and the residual behind output and down are part of the call. The opponent is the library's
bare product in bfloat16, which has none of these. Many rows are the library's own.

A chain is the products of some layers one after the other, each with weights of its own, as in a
decode step without attention: what one product can do for the next one shows only there.
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
from kernels.row_layer import COUNTERS, Heads, RowMatrix, Transform, row_layer
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
CHAIN_LAYERS = 8
# Bytes of a weight, scales included.
WEIGHT_BYTES = {"bf16": 2.0, "fp8": 1.0, "int4": 0.5 + 4 / GROUP_SIZE}


def cases() -> Iterator[Case]:
    for kind in ("bf16", "fp8"):
        yield chain_case(kind)
        yield layer_chain_case(kind)
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


def chain_case(kind: str) -> Case:
    shapes = {name: shape for name, shape in WEIGHTS.items() if name != "head"}
    num_bytes = sum(int(WEIGHT_BYTES[kind] * rows * columns) for rows, columns in shapes.values())

    def make() -> Call:
        start, norm_weight = normal(1, HIDDEN), normal(HIDDEN)
        layers = [
            {name: PRODUCTS[kind](*shape) for name, shape in shapes.items()}
            for _ in range(CHAIN_LAYERS)
        ]

        def run() -> torch.Tensor:
            stream = start
            for layer in layers:
                heads = layer["qkv"](stream, norm_weight=norm_weight, eps=1e-5)
                stream = layer["output"](heads[:, :HIDDEN], residual=stream)
                x = layer["gate_up"](stream, norm_weight=norm_weight, eps=1e-5, silu_mul=True)
                stream = layer["down"](x, residual=stream)
            return stream

        return run

    return Case(f"{kind} chain of {CHAIN_LAYERS} layers, 1 token", make, CHAIN_LAYERS * num_bytes)


def layer_chain_case(kind: str) -> Case:
    """The same products, each layer's from output to the next one's qkv as one kernel."""
    shapes = {name: shape for name, shape in WEIGHTS.items() if name != "head"}
    num_bytes = sum(int(WEIGHT_BYTES[kind] * rows * columns) for rows, columns in shapes.values())

    def make() -> Call:
        heads, stream, norm = normal(1, HIDDEN), normal(1, HIDDEN), normal(HIDDEN)
        layers = [
            {name: row_matrix(kind, *shape) for name, shape in shapes.items()}
            for _ in range(CHAIN_LAYERS)
        ]
        counters = torch.zeros(CHAIN_LAYERS, COUNTERS, dtype=torch.int32, device=norm.device)

        def run() -> torch.Tensor:
            x, attended = stream, heads
            for index, layer in enumerate(layers):
                transform = Transform(layer["output"], layer["gate_up"], layer["down"], norm)
                x, qkv = row_layer(
                    attended, x, transform, Heads(layer["qkv"], norm, None), 1e-5,
                    counters[index], counters[index - 1],
                )  # fmt: skip
                attended = qkv[:, :HIDDEN]
            return x

        return run

    name = f"{kind} chain of {CHAIN_LAYERS} layers by row_layer, 1 token"
    return Case(name, make, CHAIN_LAYERS * num_bytes)


def row_matrix(kind: str, rows: int, columns: int) -> RowMatrix:
    weight = normal(rows, columns)
    return RowMatrix(*quantize_weight(weight)) if kind == "fp8" else RowMatrix(weight)


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
