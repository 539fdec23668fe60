"""Products of some dozens of rows with a matrix, on Hopper GPUs.

A decode step of so many sequences is bound by reading the weights. The library cuts the inner
dimension of matrices with few outputs to occupy all multiprocessors and adds the parts up in
another kernel. But half of them are enough to keep the memory busy, if each has asked for
much of what it will need.

Life of a thread block, one on a multiprocessor
    1. It owns 64 rows of the weights and all of the inner dimension.
    2. One warp copies, 64 elements of the inner dimension at a time, weights and rows of x into a
       ring of stages as large as shared memory. The weights of the first round are asked for before
       the kernel in front has ended (`chained_launch`).
    3. One warpgroup multiplies. The weights are the operand of 64 rows, x is the narrow one. The
       residual is added before the only rounding.

More rows are the library's, few rows (`skinny_rows`: 8 at the most) `skinny_linear`'s. That one
multiplies by warps, with x in registers where it fits, takes 8-bit weights and norms x itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.dispatch import chained_launch, gdc_launch_dependents, gdc_wait, num_multiprocessors
from kernels.gluon_api import (
    gl,
    gluon_jit,
    gluon_jit_for_any,
    in_blocks,
    mbarrier,
    next_stage,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from kernels.thin_ring import DEPTH, OUT, fill_ring, fits_ring, make_ring, num_columns

if TYPE_CHECKING:
    import torch

_MOST_ROWS = 48
_RING_BYTES = 200 << 10
_LEAST_BLOCKS = 64  # to keep the memory busy


def fits_thin_linear(num_rows: int, weight: torch.Tensor) -> bool:
    """Whether `thin_linear` runs here and beats the library's product."""
    if not fits_ring(weight):
        return False
    blocks = -(-weight.shape[0] // OUT)
    return num_rows <= _MOST_ROWS and _LEAST_BLOCKS <= blocks <= num_multiprocessors(weight.device)


def thin_linear(
    x: torch.Tensor, weight: torch.Tensor, *, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """`x @ weight.T + residual`: `[num_rows, out_size]`.

    x: `[num_rows, in_size]`, 1 to 64 rows, contiguous; weight: `[out_size, in_size]`, contiguous;
    both bfloat16 or float16, in_size a multiple of 64. residual: `[num_rows, out_size]`,
    contiguous; the result takes its memory. Summed in float32. Needs a GPU of compute capability
    9, see `fits_thin_linear`.
    """
    assert 1 <= x.shape[0] <= 64
    assert x.is_contiguous()
    assert weight.is_contiguous()
    assert x.dtype == weight.dtype
    num_rows, in_size = x.shape
    out_size = weight.shape[0]
    out = x.new_empty(num_rows, out_size) if residual is None else residual
    assert out.is_contiguous()
    columns = num_columns(num_rows)
    chained = chained_launch(x.device)
    _thin_kernel[(-(-out_size // OUT),)](
        in_blocks(weight, OUT, DEPTH), in_blocks(x, columns, DEPTH),
        residual, out, num_rows, OUT_SIZE=out_size, COLUMNS=columns, STEPS=in_size // DEPTH,
        STAGES=_RING_BYTES // (2 * DEPTH * (OUT + columns)), OUT=OUT, DEPTH=DEPTH,
        CHAINED=chained, num_warps=4, maxnreg=128, launch_pdl=chained,
    )  # fmt: skip
    return out


@gluon_jit
def _multiply(
    residual_ptr: gl.tensor, out_ptr: gl.tensor, weights: gl.shared_memory_descriptor,
    x_memory: gl.shared_memory_descriptor, full: gl.shared_memory_descriptor,
    empty: gl.shared_memory_descriptor, num_rows: gl.tensor, OUT_SIZE: gl.constexpr,
    COLUMNS: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, OUT: gl.constexpr,
    CHAINED: gl.constexpr,
) -> None:  # fmt: skip
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    WRITTEN: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    y = gl.zeros([OUT, COLUMNS], gl.float32, layout=SUMS)
    stage = 0
    phase = 0
    last = 0
    for step in range(STEPS):
        mbarrier.wait(full.index(stage), phase)
        x = x_memory.index(stage).permute((1, 0))
        y = warpgroup_mma(weights.index(stage), x, y, is_async=True)
        y = warpgroup_mma_wait(1, deps=[y])
        if step > 0:
            mbarrier.arrive(empty.index(last), count=1)  # the step before has been read
        last = stage
        stage, phase = next_stage(stage, phase, STAGES)
    y = warpgroup_mma_wait(0, deps=[y])
    if CHAINED:
        gdc_wait()
    y = gl.convert_layout(y.permute((1, 0)), WRITTEN)
    row = gl.arange(0, COLUMNS, layout=gl.SliceLayout(1, WRITTEN))[:, None]
    column = gl.program_id(0) * OUT + gl.arange(0, OUT, layout=gl.SliceLayout(0, WRITTEN))[None, :]
    mask = (row < num_rows) & (column < OUT_SIZE)
    place = row * OUT_SIZE + column
    if residual_ptr is not None:
        y += gl.load(residual_ptr + place, mask=mask, other=0.0).to(gl.float32)
    gl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=mask)


@gluon_jit_for_any("num_rows")
def _thin_kernel(
    weight_desc: gl.tensor, x_desc: gl.tensor, residual_ptr: gl.tensor,
    out_ptr: gl.tensor, num_rows: gl.tensor, OUT_SIZE: gl.constexpr, COLUMNS: gl.constexpr,
    STEPS: gl.constexpr, STAGES: gl.constexpr, OUT: gl.constexpr, DEPTH: gl.constexpr,
    CHAINED: gl.constexpr, num_warps: gl.constexpr,
) -> None:  # fmt: skip
    """residual_ptr None: there is none, which Triton compiles apart."""
    if CHAINED:
        gdc_launch_dependents()
    weights, x_memory, full, empty = make_ring(x_desc.dtype, 1, STAGES, OUT, COLUMNS, DEPTH)
    gl.warp_specialize(
        [
            (_multiply, (residual_ptr, out_ptr, weights, x_memory, full, empty, num_rows, OUT_SIZE,
                COLUMNS, STEPS, STAGES, OUT, CHAINED)),
            (fill_ring, (weight_desc, None, x_desc, weights, x_memory, full, empty, STEPS, STAGES,
                OUT, DEPTH, CHAINED)),
        ],
        [1],
        [24],
    )  # fmt: skip
