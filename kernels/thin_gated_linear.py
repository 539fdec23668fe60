"""`silu(x @ gate.T) * (x @ up.T)` of some dozens of rows, on Hopper GPUs.

A decode step of so many sequences is bound by reading the weights, which are the largest of a
layer. The library reads them at the memory's rate too, but starts when the norm in front has
ended, and needs a kernel behind it for the activation, in float8 also for the scales.

Life of a thread block
    1. It owns 64 rows of gate and the same 64 of up.
    2. One warp copies, 128 bytes of the inner dimension at a time, weights and rows of x into a
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
    mbarrier,
    next_stage,
    warpgroup_mma,
    warpgroup_mma_wait,
)
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
    num_columns,
    num_stages,
)

if TYPE_CHECKING:
    import torch

_RING_BYTES = 100 << 10  # less than half of what a multiprocessor has
_LEAST_BLOCKS = 128  # to keep the memory busy


def fits_thin_gated_linear(num_rows: int, weight: torch.Tensor) -> bool:
    """Whether `thin_gated_linear` runs here and beats the library's product with what stands behind
    it."""
    if not fits_ring(weight):
        return False
    return fills_columns(num_rows) and weight.shape[0] >= 2 * OUT * _LEAST_BLOCKS


def thin_gated_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    scales: Scales | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`silu(gate) * up` with gate, up the halves of `x @ weight.T`: `[num_rows, intermediate]`, in
    `dtype` or x's.

    x: `[num_rows, in_size]`, 1 to 128 rows; weight: `[2 * intermediate, in_size]`, gate first; both
    contiguous, bfloat16, float16, or float8_e4m3fn with scales; in_size a multiple of 128 bytes.
    Summed and activated in float32. Needs a GPU of compute capability 9, see
    `fits_thin_gated_linear`.
    """
    assert 1 <= x.shape[0] <= MOST_ROWS
    assert x.is_contiguous()
    assert weight.is_contiguous()
    assert x.dtype == weight.dtype
    assert (x.itemsize == 1) == (scales is not None)
    num_rows, in_size = x.shape
    out_size = weight.shape[0] // 2
    out = x.new_empty(num_rows, out_size, dtype=dtype)
    columns = num_columns(num_rows)
    chained = chained_launch(x.device)
    _thin_gated_kernel[(-(-out_size // OUT),)](
        in_stages(weight[:out_size], 1, OUT), in_stages(weight[out_size:], 1, OUT),
        in_stages(x, 1, columns), scales and tuple(scales), out, num_rows, OUT_SIZE=out_size,
        COLUMNS=columns, STEPS=in_size // depth_of(x),
        STAGES=num_stages(_RING_BYTES, 2, 1, columns), CHAINED=chained, num_warps=4, maxnreg=128,
        launch_pdl=chained,
    )  # fmt: skip
    return out


@gluon_jit
def _multiply(
    scales: gl.tuple, out_ptr: gl.tensor, ring: gl.tuple, num_rows: gl.tensor,
    OUT_SIZE: gl.constexpr, COLUMNS: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr,
    CHAINED: gl.constexpr,
) -> None:  # fmt: skip
    weights, x_memory, full, empty = ring
    STEP: gl.constexpr = 256 // weights.dtype.primitive_bitwidth
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, STEP])
    WRITTEN: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    by_gate, by_up, by_row = 1.0, 1.0, 1.0
    if scales is not None:
        line = gl.program_id(0) * 64 + gl.arange(0, 64, gl.SliceLayout(1, SUMS))[:, None]
        by_gate = gl.load(scales[1] + line, mask=line < OUT_SIZE, other=0.0)
        by_up = gl.load(scales[1] + OUT_SIZE + line, mask=line < OUT_SIZE, other=0.0)
    if CHAINED:
        gdc_wait()
    if scales is not None:
        x_row = gl.arange(0, COLUMNS, gl.SliceLayout(0, SUMS))[None, :]
        by_row = gl.load(scales[0] + x_row, mask=x_row < num_rows, other=0.0)
    gate = gl.zeros([64, COLUMNS], gl.float32, layout=SUMS)
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
    gate, up = gate * by_row * by_gate, up * by_row * by_up
    activated = (gate / (1.0 + gl.exp(-gate)) * up).to(out_ptr.dtype.element_ty)
    activated = gl.convert_layout(activated.permute((1, 0)), WRITTEN)
    row = gl.arange(0, COLUMNS, layout=gl.SliceLayout(1, WRITTEN))[:, None]
    column = gl.program_id(0) * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, WRITTEN))[None, :]
    mask = (row < num_rows) & (column < OUT_SIZE)
    gl.store(out_ptr + row * OUT_SIZE + column, activated, mask=mask)


@gluon_jit_for_any("num_rows")
def _thin_gated_kernel(
    gate_desc: gl.tensor, up_desc: gl.tensor, x_desc: gl.tensor, scales: gl.tuple,
    out_ptr: gl.tensor, num_rows: gl.tensor, OUT_SIZE: gl.constexpr, COLUMNS: gl.constexpr,
    STEPS: gl.constexpr, STAGES: gl.constexpr, CHAINED: gl.constexpr, num_warps: gl.constexpr,
) -> None:  # fmt: skip
    """scales may be None, which Triton compiles apart."""
    if CHAINED:
        gdc_launch_dependents()
    ring = make_ring(x_desc.dtype, 2, STAGES, COLUMNS)
    row = gl.program_id(0) * 64
    gl.warp_specialize(
        [
            (_multiply, (scales, out_ptr, ring, num_rows, OUT_SIZE, COLUMNS, STEPS, STAGES,
                CHAINED)),
            (fill_ring, (gate_desc, up_desc, x_desc, (row, 0), ring, STEPS, STAGES, CHAINED)),
        ],
        [1],
        [24],
    )  # fmt: skip
