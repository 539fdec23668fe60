"""Products of some dozens of rows with a matrix, on Hopper GPUs.

A decode step of so many sequences is bound by reading the weights. The library cuts the inner
dimension of matrices with few outputs to occupy all multiprocessors and adds the parts up in
another kernel. But half of them are enough to keep the memory busy, if each has asked for
much of what it will need. Beside float8 weights it also needs kernels for scales, bias and residual
(`scale_product`), which are part of the product here.

Life of a thread block, one on a multiprocessor
    1. It owns 64 rows of the weights and all of the inner dimension. Of long rows in float8 it owns
       32, so that there are more blocks: x is half of what each of them reads.
    2. One warp copies, 128 bytes of the inner dimension at a time, weights and rows of x into a
       ring of stages as large as shared memory. The weights of the first round are asked for before
       the kernel in front has ended (`chained_launch`).
    3. One warpgroup multiplies. The weights are the operand of 64 rows, x is the narrow one.
       Scales, bias and residual meet the sums before the only rounding.

More rows are the library's, few rows (`skinny_rows`: 8 at the most) `skinny_linear`'s. That one
multiplies by warps, with x in registers where it fits, takes 8-bit weights beside rows of 16 bits
and norms x itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.dispatch import chained_launch, gdc_launch_dependents, gdc_wait, num_multiprocessors
from kernels.gluon_api import gl, gluon_jit, gluon_jit_for_any
from kernels.thin_ring import (
    MOST_ROWS,
    OUT,
    Scales,
    depth_of,
    fill_ring,
    fills_columns,
    fits_ring,
    in_stages,
    make_ring,
    multiply_ring,
    num_columns,
    num_stages,
    own_blocks,
)

if TYPE_CHECKING:
    import torch

_MOST_ROWS = 48  # in 16 bits
_RING_BYTES = 200 << 10
_LEAST_BLOCKS = 64  # to keep the memory busy
# Beyond, float8 weights of 64 rows are several rounds of the ring. With more rows of x two blocks
# of them would take most of it.
_LONG_INPUT, _MOST_ROWS_OF_TWO = 8192, 64


def fits_thin_linear(num_rows: int, weight: torch.Tensor) -> bool:
    """Whether `thin_linear` runs here and beats the library's product."""
    if not fits_ring(weight):
        return False
    blocks = -(-weight.shape[0] // OUT)
    some = fills_columns(num_rows) and (weight.itemsize == 1 or num_rows <= _MOST_ROWS)
    return some and _LEAST_BLOCKS <= blocks <= num_multiprocessors(weight.device)


def thin_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    scales: Scales | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`x @ weight.T + bias + residual`: `[num_rows, out_size]`, in `dtype` or x's.

    x: `[num_rows, in_size]`, 1 to 64 rows, in float8 to 128, contiguous; weight: `[out_size,
    in_size]`, contiguous; both bfloat16, float16, or float8_e4m3fn with scales; in_size a multiple
    of 128 bytes. bias: `[out_size]`. residual: `[num_rows, out_size]`, contiguous, in the result's
    type; the result takes its memory. Summed in float32. Needs a GPU of compute capability 9, see
    `fits_thin_linear`.
    """
    num_rows, in_size = x.shape
    assert 1 <= num_rows <= (MOST_ROWS if x.itemsize == 1 else 64)
    assert x.is_contiguous()
    assert weight.is_contiguous()
    assert x.dtype == weight.dtype
    assert (x.itemsize == 1) == (scales is not None)
    out_size = weight.shape[0]
    out = x.new_empty(num_rows, out_size, dtype=dtype) if residual is None else residual
    assert out.is_contiguous()
    columns, blocks = num_columns(num_rows), _blocks(num_rows, weight)
    steps = -(-in_size // (depth_of(x) * blocks))
    chained = chained_launch(x.device)
    _thin_kernel[(-(-out_size // (OUT // blocks)),)](
        in_stages(weight, blocks, OUT // blocks), in_stages(x, blocks, columns),
        scales and tuple(scales), bias, residual, out, num_rows, OUT_SIZE=out_size, COLUMNS=columns,
        STEPS=steps, STAGES=num_stages(_RING_BYTES, 1, blocks, columns), BLOCKS=blocks,
        CHAINED=chained, num_warps=4, maxnreg=128, launch_pdl=chained,
    )  # fmt: skip
    return out


def _blocks(num_rows: int, weight: torch.Tensor) -> int:
    """Of the inner dimension, in a stage."""
    if weight.itemsize > 1 or weight.shape[1] <= _LONG_INPUT or num_rows > _MOST_ROWS_OF_TWO:
        return 1
    return 2 if 2 * weight.shape[0] <= OUT * num_multiprocessors(weight.device) else 1


@gluon_jit
def _multiply(
    scales: gl.tuple, bias_ptr: gl.tensor, residual_ptr: gl.tensor, out_ptr: gl.tensor,
    ring: gl.tuple, num_rows: gl.tensor, OUT_SIZE: gl.constexpr, COLUMNS: gl.constexpr,
    STEPS: gl.constexpr, STAGES: gl.constexpr, BLOCKS: gl.constexpr, CHAINED: gl.constexpr,
) -> None:  # fmt: skip
    """What meets the sums is asked for before they are made."""
    TILE: gl.constexpr = 64 // BLOCKS
    WRITTEN: gl.constexpr = gl.BlockedLayout([1, 8], [256 // TILE, TILE // 8], [4, 1], [1, 0])
    row = gl.arange(0, COLUMNS, layout=gl.SliceLayout(1, WRITTEN))[:, None]
    column = (
        gl.program_id(0) * TILE + gl.arange(0, TILE, layout=gl.SliceLayout(0, WRITTEN))[None, :]
    )
    mask = (row < num_rows) & (column < OUT_SIZE)
    place = row * OUT_SIZE + column
    by_row, by_column = 1.0, 1.0
    if scales is not None:
        by_column = gl.load(scales[1] + column, mask=column < OUT_SIZE, other=0.0)
    added = gl.zeros([COLUMNS, TILE], gl.float32, layout=WRITTEN)
    if bias_ptr is not None:
        added += gl.load(bias_ptr + column, mask=column < OUT_SIZE, other=0.0).to(gl.float32)
    if CHAINED:
        gdc_wait()
    if scales is not None:
        by_row = gl.load(scales[0] + row, mask=row < num_rows, other=0.0)
    if residual_ptr is not None:
        added += gl.load(residual_ptr + place, mask=mask, other=0.0).to(gl.float32)
    y = own_blocks(multiply_ring(ring, BLOCKS * COLUMNS, STEPS, STAGES), BLOCKS)
    y = gl.convert_layout(y, WRITTEN) * by_row * by_column + added
    gl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=mask)


@gluon_jit_for_any("num_rows")
def _thin_kernel(
    weight_desc: gl.tensor, x_desc: gl.tensor, scales: gl.tuple, bias_ptr: gl.tensor,
    residual_ptr: gl.tensor, out_ptr: gl.tensor, num_rows: gl.tensor, OUT_SIZE: gl.constexpr,
    COLUMNS: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, BLOCKS: gl.constexpr,
    CHAINED: gl.constexpr, num_warps: gl.constexpr,
) -> None:  # fmt: skip
    """scales, bias_ptr and residual_ptr may be None, which Triton compiles apart."""
    if CHAINED:
        gdc_launch_dependents()
    ring = make_ring(x_desc.dtype, 1, STAGES, BLOCKS * COLUMNS)
    row = gl.program_id(0) * (64 // BLOCKS)
    gl.warp_specialize(
        [
            (_multiply, (scales, bias_ptr, residual_ptr, out_ptr, ring, num_rows, OUT_SIZE,
                COLUMNS, STEPS, STAGES, BLOCKS, CHAINED)),
            (fill_ring, (weight_desc, None, x_desc, (row, 0), ring, STEPS, STAGES, CHAINED)),
        ],
        [1],
        [24],
    )  # fmt: skip
