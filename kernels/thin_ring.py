"""What the products of some dozens of rows share: a ring of stages in shared memory, which one warp
fills ahead of a warpgroup that multiplies. In Gluon, for `thin_linear` and `thin_gated_linear`.

A thread block owns OUT rows of one matrix, or of both halves of a gated one. A stage holds DEPTH
elements of the inner dimension: weights of each half, and rows of x. The weights of the first round
are asked for before the kernel in front has ended (`chained_launch`).
"""

from __future__ import annotations

import torch

from kernels.dispatch import gdc_wait, is_hopper, next_power_of_two
from kernels.gluon_api import (
    HAS_GLUON,
    async_load,
    fence_async_shared,
    gl,
    gluon_jit,
    mbarrier,
    next_stage,
)

OUT, DEPTH = 64, 64  # weight rows of a product, inner elements of a stage


def fits_ring(weight: torch.Tensor) -> bool:
    """Whether these kernels take such weights, and run where they are."""
    if not HAS_GLUON or not weight.is_cuda or weight.dtype not in (torch.bfloat16, torch.float16):
        return False
    return is_hopper(weight.device) and weight.shape[1] % DEPTH == 0


def num_columns(num_rows: int) -> int:
    """Of the narrow operand, which rows of x are."""
    return max(16, next_power_of_two(num_rows))


@gluon_jit
def make_ring(
    DTYPE: gl.constexpr, HALVES: gl.constexpr, STAGES: gl.constexpr, OUT: gl.constexpr,
    COLUMNS: gl.constexpr, DEPTH: gl.constexpr,
) -> tuple[
    gl.shared_memory_descriptor, gl.shared_memory_descriptor, gl.shared_memory_descriptor,
    gl.shared_memory_descriptor,
]:  # fmt: skip
    """Weights, rows of x, and whether each stage is full and empty."""
    TILED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    weights = gl.allocate_shared_memory(DTYPE, [HALVES * STAGES, OUT, DEPTH], TILED)
    x_memory = gl.allocate_shared_memory(DTYPE, [STAGES, COLUMNS, DEPTH], TILED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    return weights, x_memory, full, empty


@gluon_jit
def _copy_weights(
    weight_desc: gl.tensor, up_desc: gl.tensor, row: gl.tensor, k: gl.tensor, bar: gl.tensor,
    weights: gl.shared_memory_descriptor, stage: gl.tensor,
) -> None:  # fmt: skip
    if up_desc is None:
        async_load(weight_desc, [row, k], bar, weights.index(stage))
    else:
        async_load(weight_desc, [row, k], bar, weights.index(2 * stage))
        async_load(up_desc, [row, k], bar, weights.index(2 * stage + 1))


@gluon_jit
def fill_ring(
    weight_desc: gl.tensor, up_desc: gl.tensor, x_desc: gl.tensor,
    weights: gl.shared_memory_descriptor, x_memory: gl.shared_memory_descriptor,
    full: gl.shared_memory_descriptor, empty: gl.shared_memory_descriptor, STEPS: gl.constexpr,
    STAGES: gl.constexpr, OUT: gl.constexpr, DEPTH: gl.constexpr, CHAINED: gl.constexpr,
) -> None:  # fmt: skip
    """The warp that copies. up_desc: the second half, or None."""
    HALVES: gl.constexpr = 1 if up_desc is None else 2
    BYTES: gl.constexpr = HALVES * weight_desc.block_type.nbytes + x_desc.block_type.nbytes
    EARLY: gl.constexpr = min(STEPS, STAGES)
    row = gl.program_id(0) * OUT
    for step in gl.static_range(EARLY):
        bar = full.index(step)
        mbarrier.expect(bar, BYTES)
        _copy_weights(weight_desc, up_desc, row, step * DEPTH, bar, weights, step)
    if CHAINED:
        gdc_wait()
    for step in gl.static_range(EARLY):
        async_load(x_desc, [0, step * DEPTH], full.index(step), x_memory.index(step))
    stage = 0
    phase = 0
    for step in range(STAGES, STEPS):
        mbarrier.wait(empty.index(stage), phase)
        bar = full.index(stage)
        mbarrier.expect(bar, BYTES)
        k = step * DEPTH
        _copy_weights(weight_desc, up_desc, row, k, bar, weights, stage)
        async_load(x_desc, [0, k], bar, x_memory.index(stage))
        stage, phase = next_stage(stage, phase, STAGES)
