"""A process that compiles the Gluon kernels of larger batches for Hopper, and says which it could.

It needs no GPU. In a process of its own because Triton's compiler complains when that one ends.
"""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from kernels.gated_linear import _gated_kernel
from kernels.gluon_api import gl
from kernels.pair_mlp import cut_of
from kernels.pair_programs import pair_kernel
from kernels.thin_gated_linear import _thin_gated_kernel
from kernels.thin_linear import _thin_kernel


def matrix(*block: int, bits: int = 16) -> str:
    """The type of a descriptor that copies such blocks."""
    layout = gl.NVMMASharedLayout(128, bits, rank=len(block))
    kind = "bf16" if bits == 16 else "fp8e4nv"
    return f"tensordesc<{kind}[{', '.join(map(str, block))}],{layout!r}>"


def compiles(kernel: Any, types: dict[str, Any], constants: dict[str, Any]) -> bool:
    """`constants`: the arguments that are not in `types`."""
    names = kernel.arg_names
    source = GluonASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(at,): constants[name] for at, name in enumerate(names) if name not in types},
    )
    options = {"num_warps": 4, "maxnreg": 168}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return "wgmma" in compiled.asm["ptx"]


THIN: dict[str, Any] = {
    "OUT_SIZE": 4096, "COLUMNS": 16, "STEPS": 64, "STAGES": 4, "BLOCKS": 1, "CHAINED": True,
    "num_warps": 4, "scales": None, "bias_ptr": None, "residual_ptr": None,
}  # fmt: skip
GATED: dict[str, Any] = {
    "COLUMNS": 14336, "STEPS": 64, "GRID": 132, "STAGES": 4, "TILE_ROWS": 128,
    "TILE_COLUMNS": 128, "DEPTH": 64, "AT_ONCE": 8, "num_warps": 4,
}  # fmt: skip
OUTPUT = {"out_ptr": "*bf16", "num_rows": "i32"}
THIN_TYPES = {"weight_desc": matrix(1, 64, 64), "x_desc": matrix(1, 16, 64), **OUTPUT}
THIN_GATED_TYPES = {"gate_desc": matrix(1, 64, 64), "up_desc": matrix(1, 64, 64),
    "x_desc": matrix(1, 16, 64), **OUTPUT}  # fmt: skip
# Beside float8 weights.
SCALED: dict[str, Any] = {"scales": ("*fp32", "*fp32")}
THIN_FLOAT8_TYPES = {"weight_desc": matrix(2, 32, 128, bits=8),
    "x_desc": matrix(2, 16, 128, bits=8), "residual_ptr": "*bf16", **OUTPUT, **SCALED}  # fmt: skip
THIN_GATED_FLOAT8_TYPES = {"gate_desc": matrix(1, 64, 128, bits=8),
    "up_desc": matrix(1, 64, 128, bits=8), "x_desc": matrix(1, 16, 128, bits=8), **OUTPUT,
    **SCALED}  # fmt: skip
GATED_TYPES = {"gate_desc": matrix(128, 64), "up_desc": matrix(128, 64), "x_desc": matrix(64, 64),
    "out_desc": matrix(64, 128), "num_rows": "i32"}  # fmt: skip
CUT = cut_of(4096, 14336, 132)
PAIR: dict[str, Any] = {
    "HIDDEN": 4096, "INTER": 14336, "PROGRAMS": 132, "STAGES": 4, "num_warps": 4,
    "TILES": CUT and CUT.tiles, "FRONT": CUT and CUT.front, "PARTS": CUT and CUT.parts,
}  # fmt: skip
PAIR_TYPES = GATED_TYPES | {"activated_desc": matrix(64, 64), "down_desc": matrix(128, 64),
    "parts_ptr": "*fp32", "counters_ptr": "*i32"}  # fmt: skip

CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "thin_linear": (_thin_kernel, THIN_TYPES, THIN),
    "thin_linear_residual": (_thin_kernel, THIN_TYPES | {"residual_ptr": "*bf16"}, THIN),
    "thin_gated_linear": (_thin_gated_kernel, THIN_GATED_TYPES, THIN),
    "thin_linear_float8": (_thin_kernel, THIN_FLOAT8_TYPES, THIN | {"BLOCKS": 2}),
    "thin_gated_linear_float8": (_thin_gated_kernel, THIN_GATED_FLOAT8_TYPES, THIN),
    "gated_linear": (_gated_kernel, GATED_TYPES, GATED),
    "pair_mlp": (pair_kernel, PAIR_TYPES, PAIR),
}

if __name__ == "__main__":
    if all(compiles(*CASES[name]) for name in sys.argv[1:]):
        print("compiled", *sys.argv[1:])
