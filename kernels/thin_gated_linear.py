"""`silu(x @ gate.T) * (x @ up.T)` of some dozens of rows, on Hopper GPUs.

A decode step of so many sequences is bound by reading the weights, which are the largest of a
layer. The library reads them at the memory's rate too, but starts when the norm in front has
ended, and needs a kernel behind it for the activation.

Life of a thread block
    1. It owns 64 rows of gate and the same 64 of up.
    2. One warp copies, 64 elements of the inner dimension at a time, weights and rows of x into a
       ring of stages. The weights of the first round are asked for before the kernel in front has
       ended (`chained_launch`). Two blocks fit on a multiprocessor.
    3. One warpgroup multiplies. The weights are the operand of 64 rows, x is the narrow one; a
       thread holds the sums of gate and up of the same elements and activates them in registers.

More rows are `gated_linear`'s and the library's, few rows `skinny_linear`'s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.dispatch import chained_launch, gdc_launch_dependents, gdc_wait
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

# Between the two the library has tiles that suit the rows better.
_SOME_ROWS, _MANY_ROWS, _MOST_ROWS = 64, 112, 128
_RING_BYTES = 100 << 10  # less than half of what a multiprocessor has
_LEAST_BLOCKS = 128  # to keep the memory busy


def fits_thin_gated_linear(num_rows: int, weight: torch.Tensor) -> bool:
    """Whether `thin_gated_linear` runs here and beats the library's product with `silu_mul`."""
    if not fits_ring(weight):
        return False
    suits = num_rows <= _SOME_ROWS or _MANY_ROWS < num_rows <= _MOST_ROWS
    return suits and weight.shape[0] >= 2 * OUT * _LEAST_BLOCKS


def thin_gated_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` with gate, up the halves of `x @ weight.T`: `[num_rows, intermediate]`.

    x: `[num_rows, in_size]`, 1 to 128 rows; weight: `[2 * intermediate, in_size]`, gate first; both
    contiguous, bfloat16 or float16, in_size a multiple of 64. Summed and activated in float32.
    Needs a GPU of compute capability 9, see `fits_thin_gated_linear`.
    """
    assert 1 <= x.shape[0] <= _MOST_ROWS
    assert x.is_contiguous()
    assert weight.is_contiguous()
    assert x.dtype == weight.dtype
    num_rows, in_size = x.shape
    out_size = weight.shape[0] // 2
    out = x.new_empty(num_rows, out_size)
    columns = num_columns(num_rows)
    chained = chained_launch(x.device)
    _thin_gated_kernel[(-(-out_size // OUT),)](
        in_blocks(weight[:out_size], OUT, DEPTH), in_blocks(weight[out_size:], OUT, DEPTH),
        in_blocks(x, columns, DEPTH), out, num_rows, OUT_SIZE=out_size, COLUMNS=columns,
        STEPS=in_size // DEPTH, STAGES=_RING_BYTES // (2 * DEPTH * (2 * OUT + columns)),
        OUT=OUT, DEPTH=DEPTH, CHAINED=chained, num_warps=4, maxnreg=128, launch_pdl=chained,
    )  # fmt: skip
    return out


@gluon_jit
def _multiply(
    out_ptr: gl.tensor, weights: gl.shared_memory_descriptor,
    x_memory: gl.shared_memory_descriptor, full: gl.shared_memory_descriptor,
    empty: gl.shared_memory_descriptor, num_rows: gl.tensor, OUT_SIZE: gl.constexpr,
    COLUMNS: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, OUT: gl.constexpr,
    CHAINED: gl.constexpr,
) -> None:  # fmt: skip
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    WRITTEN: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    gate = gl.zeros([OUT, COLUMNS], gl.float32, layout=SUMS)
    up = gate
    stage = 0
    phase = 0
    last = 0
    for step in range(STEPS):
        mbarrier.wait(full.index(stage), phase)
        x = x_memory.index(stage).permute((1, 0))
        gate = warpgroup_mma(weights.index(2 * stage), x, gate, is_async=True)
        up = warpgroup_mma(weights.index(2 * stage + 1), x, up, is_async=True)
        gate, up = warpgroup_mma_wait(2, deps=[gate, up])
        if step > 0:
            mbarrier.arrive(empty.index(last), count=1)  # the step before has been read
        last = stage
        stage, phase = next_stage(stage, phase, STAGES)
    gate, up = warpgroup_mma_wait(0, deps=[gate, up])
    activated = (gate / (1.0 + gl.exp(-gate)) * up).to(out_ptr.dtype.element_ty)
    activated = gl.convert_layout(activated.permute((1, 0)), WRITTEN)
    row = gl.arange(0, COLUMNS, layout=gl.SliceLayout(1, WRITTEN))[:, None]
    column = gl.program_id(0) * OUT + gl.arange(0, OUT, layout=gl.SliceLayout(0, WRITTEN))[None, :]
    if CHAINED:
        gdc_wait()
    mask = (row < num_rows) & (column < OUT_SIZE)
    gl.store(out_ptr + row * OUT_SIZE + column, activated, mask=mask)


@gluon_jit_for_any("num_rows")
def _thin_gated_kernel(
    gate_desc: gl.tensor, up_desc: gl.tensor,
    x_desc: gl.tensor, out_ptr: gl.tensor, num_rows: gl.tensor,
    OUT_SIZE: gl.constexpr, COLUMNS: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr,
    OUT: gl.constexpr, DEPTH: gl.constexpr, CHAINED: gl.constexpr, num_warps: gl.constexpr,
) -> None:  # fmt: skip
    if CHAINED:
        gdc_launch_dependents()
    weights, x_memory, full, empty = make_ring(x_desc.dtype, 2, STAGES, OUT, COLUMNS, DEPTH)
    gl.warp_specialize(
        [
            (_multiply, (out_ptr, weights, x_memory, full, empty, num_rows, OUT_SIZE, COLUMNS,
                STEPS, STAGES, OUT, CHAINED)),
            (fill_ring, (gate_desc, up_desc, x_desc, weights, x_memory, full, empty, STEPS,
                STAGES, OUT, DEPTH, CHAINED)),
        ],
        [1],
        [24],
    )  # fmt: skip
