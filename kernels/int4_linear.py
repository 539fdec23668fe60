"""Products with four-bit weights (`kernels/int4_packing.py`), activations in half precision.

For few rows the codes are widened in registers on their way to the tensor cores, so that only half
a byte per weight is read. For many rows, where arithmetic counts, the matrix is widened into memory
once and the library multiplies.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from kernels.dispatch import jit, runs_triton, tl
from kernels.int4_packing import TILE_IN, TILE_OUT, Int4Weight, dequantize
from kernels.rms_norm import rms_norm
from kernels.silu_mul import silu_mul
from kernels.skinny_stream import MAX_ROWS, can_stream, stream

_TILES_PER_PROGRAM = 4
# Rows up to which codes are widened in registers, twice if need be.
_MAX_STREAMED = 2 * MAX_ROWS


def int4_linear(
    x: torch.Tensor,
    weight: Int4Weight,
    *,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
    silu_mul: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`act(norm(x) @ weight.T + bias) + residual`, arguments and result as in `skinny_linear`.

    x is in the type of weight.zeros.
    """
    assert x.dim() == 2
    assert x.shape[1] == weight.in_size
    assert x.dtype == weight.zeros.dtype
    out_size = weight.out_size // 2 if silu_mul else weight.out_size
    if out is None:
        out = torch.empty(x.shape[0], out_size, dtype=x.dtype, device=x.device)
    if x.shape[0] == 0:
        return out
    streamed = (
        x.shape[0] <= _MAX_STREAMED
        and x.itemsize == 2
        and can_stream(
            x.device, weight.in_size, torch.int32, gated_out=out_size if silu_mul else TILE_OUT
        )
    )
    if norm_weight is not None and (weight.order is not None or not streamed):
        x, norm_weight = rms_norm(x, norm_weight, eps), None
    if weight.order is not None:
        x = x.index_select(1, weight.order)
    if not streamed:
        return _composed(x, widen(weight), bias, residual, silu_mul, out)
    for first in range(0, x.shape[0], MAX_ROWS):
        rows = slice(first, first + MAX_ROWS)
        stream(
            x[rows], weight.codes, out[rows], int4=weight, bias=bias, norm_weight=norm_weight,
            eps=eps, residual=None if residual is None else residual[rows], gated=silu_mul,
        )  # fmt: skip
    return out


def _composed(
    x: torch.Tensor,
    matrix: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gated: bool,
    out: torch.Tensor,
) -> torch.Tensor:
    y = linear(x, matrix, bias)
    if gated:
        y = silu_mul(y)
    return out.copy_(y) if residual is None else torch.add(y, residual, out=out)


def widen(weight: Int4Weight) -> torch.Tensor:
    """The matrix `[N, K]` in half precision, columns in packed order."""
    if not runs_triton(weight.codes):
        return dequantize(weight)
    out_size, in_size = weight.out_size, weight.in_size
    matrix = torch.empty(out_size, in_size, dtype=weight.zeros.dtype, device=weight.codes.device)
    tiles_in = in_size // TILE_IN
    grid = (out_size // TILE_OUT, -(-tiles_in // _TILES_PER_PROGRAM))
    _widen_kernel[grid](
        weight.codes, weight.scales, weight.zeros, matrix, out_size, in_size, weight.group_size,
        TILES=_TILES_PER_PROGRAM, num_warps=4,
    )  # fmt: skip
    return matrix


@jit
def _widen_kernel(
    codes_ptr: tl.tensor, scales_ptr: tl.tensor, zeros_ptr: tl.tensor, matrix_ptr: tl.tensor,
    out_size: tl.tensor, in_size: tl.tensor, group_size: tl.tensor, TILES: tl.constexpr,
) -> None:  # fmt: skip
    """TILES tiles of 16 outputs by 64 inputs, see `int4_packing`: 8 words of 8 inputs to a row."""
    row = tl.arange(0, 16)[:, None, None]
    eight = tl.arange(0, 8 * TILES)[None, :, None]
    i = tl.arange(0, 8)[None, None, :]
    column = (tl.program_id(1) * TILES * 8 + eight) * 8 + i
    output = tl.program_id(0) * 16 + row
    word = row % 8 * 16 + eight % 4 * 4 + eight // 4 % 2 * 2 + row // 8
    tile = tl.program_id(0).to(tl.int64) * (in_size // 64) + tl.program_id(1) * TILES + eight // 8
    mask = column < in_size
    words = tl.load(codes_ptr + tile * 128 + word, mask=(column - i) < in_size, other=0)
    codes = (words >> (i // 2 * 4 + i % 2 * 16)) & 15
    group = column // group_size * out_size + output
    zero = tl.load(zeros_ptr + group, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scales_ptr + group, mask=mask, other=0.0).to(tl.float32)
    y = (codes.to(tl.float32) - zero) * scale
    place = output.to(tl.int64) * in_size + column
    tl.store(matrix_ptr + place, y.to(matrix_ptr.dtype.element_ty), mask=mask)
