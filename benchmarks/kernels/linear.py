"""Matrix products of one layer and of the head; the library's product is both figure and peer."""

from __future__ import annotations

from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from collections.abc import Iterator

# Name: rows and columns of the weight.
WEIGHTS = {
    "qkv": ((HEADS + 2 * KV_HEADS) * HEAD_SIZE, HIDDEN),
    "output": (HIDDEN, HEADS * HEAD_SIZE),
    "gate_up": (2 * INTERMEDIATE, HIDDEN),
    "down": (HIDDEN, INTERMEDIATE),
    "head": (VOCABULARY, HIDDEN),
}


def cases() -> Iterator[Case]:
    for num_tokens in (1, 32, 128, 256, 8192):
        for name in WEIGHTS:
            if name != "head" or num_tokens <= 256:
                yield library_case(name, num_tokens)


def library_case(name: str, num_tokens: int) -> Case:
    rows, columns = WEIGHTS[name]

    def make() -> Call:
        x, weight = normal(num_tokens, columns), normal(rows, columns)
        return lambda: linear(x, weight)

    return Case(
        f"linear {name} (library), {num_tokens} tokens",
        make,
        num_bytes=2 * (rows * columns + num_tokens * (rows + columns)),
        num_flops=2 * num_tokens * rows * columns,
    )
