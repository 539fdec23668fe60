"""What the products of some dozens of rows share: a ring of stages in shared memory, which one warp
fills ahead of a warpgroup that multiplies. In Gluon, for `thin_linear` and `thin_gated_linear`, of
16 and of 8 bits.

A thread block owns some rows of one matrix, or of both halves of a gated one. A stage holds 128
bytes of the inner dimension, a block: 64 rows of weights of each half, and rows of x. The weights
of the first round are asked for before the kernel in front has ended (`chained_launch`).

A stage may also hold two blocks of half as many rows of weights, with the two blocks of x as
columns beside each other: there are twice as many thread blocks then, on as many multiprocessors.
Of the products of all rows with all columns the half that belongs together is added up
(`own_blocks`).

8-bit rows and weights are float8_e4m3fn and come with `Scales`. Sums are made in the tensor cores'
fast mode, see `fp8_linear`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from kernels.dispatch import gdc_wait, is_hopper, next_power_of_two
from kernels.gluon_api import (
    HAS_GLUON,
    Blocks,
    async_load,
    fence_async_shared,
    gl,
    gluon_jit,
    mbarrier,
    next_stage,
    reinterpret,
    shared_layout,
    warpgroup_mma,
    warpgroup_mma_wait,
)

OUT, BLOCK_BYTES = 64, 128  # rows of weights of a stage, bytes of the inner dimension of a block
MOST_ROWS = 128
_SOME_ROWS, _MANY_ROWS = 64, 112
_TYPES = (torch.bfloat16, torch.float16, torch.float8_e4m3fn)


class Scales(NamedTuple):
    """What float8 values were divided by, float32: of each row of x, `[num_rows, 1]`, and of each
    row of the weights, `[out_size]`."""

    rows: torch.Tensor
    weights: torch.Tensor


def depth_of(matrix: torch.Tensor) -> int:
    """Elements of a block."""
    return BLOCK_BYTES // matrix.itemsize


def fits_ring(weight: torch.Tensor) -> bool:
    """Whether these kernels take such weights, and run where they are."""
    if not HAS_GLUON or not weight.is_cuda or weight.dtype not in _TYPES:
        return False
    return is_hopper(weight.device) and weight.shape[1] % depth_of(weight) == 0


def num_columns(num_rows: int) -> int:
    """Of the narrow operand, which rows of x are."""
    return max(16, next_power_of_two(num_rows))


def fills_columns(num_rows: int) -> bool:
    """Whether enough of the columns are rows: between the two the library has tiles that suit the
    rows better."""
    return 0 < num_rows <= _SOME_ROWS or _MANY_ROWS < num_rows <= MOST_ROWS


def in_stages(matrix: torch.Tensor, blocks: int, rows: int) -> Blocks:
    """A matrix for the bulk copy engine: `[blocks of inputs, rows, inputs of a block]`, so many of
    the first two at a time."""
    depth = depth_of(matrix)
    num_rows, size = matrix.shape
    return Blocks(
        matrix, [size // depth, num_rows, depth], [depth, size, 1], [blocks, rows, depth],
        shared_layout(8 * matrix.itemsize, 3),
    )  # fmt: skip


def num_stages(ring_bytes: int, halves: int, blocks: int, columns: int) -> int:
    return ring_bytes // (BLOCK_BYTES * (halves * OUT + blocks * columns))


@gluon_jit
def make_ring(
    DTYPE: gl.constexpr, HALVES: gl.constexpr, STAGES: gl.constexpr, COLUMNS: gl.constexpr
) -> gl.tuple:
    """Weights and rows of x as the tensor cores read them, and whether each stage is full and
    empty. COLUMNS: of all blocks of a stage."""
    BITS: gl.constexpr = DTYPE.primitive_bitwidth
    TILED: gl.constexpr = gl.NVMMASharedLayout(128, BITS, rank=2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    weights = gl.allocate_shared_memory(DTYPE, [HALVES * STAGES, 64, 1024 // BITS], TILED)
    x_memory = gl.allocate_shared_memory(DTYPE, [STAGES, COLUMNS, 1024 // BITS], TILED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    return weights, x_memory, full, empty


@gluon_jit
def _copy(
    desc: gl.tensor, block: gl.tensor, at: gl.tuple, bar: gl.tensor,
    target: gl.shared_memory_descriptor,
) -> None:  # fmt: skip
    """From this block of inputs on to the memory of a stage."""
    target = reinterpret(target, target.dtype, desc.block_shape, desc.layout)
    async_load(desc, (block,) + at, bar, target)  # noqa: RUF005


@gluon_jit
def _copy_weights(
    weight_desc: gl.tensor, up_desc: gl.tensor, block: gl.tensor, at: gl.tuple, bar: gl.tensor,
    weights: gl.shared_memory_descriptor, stage: gl.tensor,
) -> None:  # fmt: skip
    if up_desc is None:
        _copy(weight_desc, block, at, bar, weights.index(stage))
    else:
        _copy(weight_desc, block, at, bar, weights.index(2 * stage))
        _copy(up_desc, block, at, bar, weights.index(2 * stage + 1))


@gluon_jit
def fill_ring(
    weight_desc: gl.tensor, up_desc: gl.tensor, x_desc: gl.tensor, at: gl.tuple, ring: gl.tuple,
    STEPS: gl.constexpr, STAGES: gl.constexpr, CHAINED: gl.constexpr,
) -> None:  # fmt: skip
    """The warp that copies. up_desc: the second half, or None. at: where the rows of weights begin,
    and 0: places in their descriptor behind that of a block of inputs."""
    weights, x_memory, full, empty = ring
    BLOCKS: gl.constexpr = x_desc.block_shape[0]
    HALVES: gl.constexpr = 1 if up_desc is None else 2
    BYTES: gl.constexpr = HALVES * weight_desc.block_type.nbytes + x_desc.block_type.nbytes
    EARLY: gl.constexpr = min(STEPS, STAGES)
    for step in gl.static_range(EARLY):
        bar = full.index(step)
        mbarrier.expect(bar, BYTES)
        _copy_weights(weight_desc, up_desc, step * BLOCKS, at, bar, weights, step)
    if CHAINED:
        gdc_wait()
    for step in gl.static_range(EARLY):
        _copy(x_desc, step * BLOCKS, (0, 0), full.index(step), x_memory.index(step))
    stage = 0
    phase = 0
    for step in range(STAGES, STEPS):
        mbarrier.wait(empty.index(stage), phase)
        bar = full.index(stage)
        mbarrier.expect(bar, BYTES)
        _copy_weights(weight_desc, up_desc, step * BLOCKS, at, bar, weights, stage)
        _copy(x_desc, step * BLOCKS, (0, 0), bar, x_memory.index(stage))
        stage, phase = next_stage(stage, phase, STAGES)


@gluon_jit
def multiply_ring(
    ring: gl.tuple, COLUMNS: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr
) -> gl.tensor:
    """The warpgroup that multiplies: sums `[64, COLUMNS]` over all steps."""
    weights, x_memory, full, empty = ring
    DEPTH: gl.constexpr = 256 // weights.dtype.primitive_bitwidth
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, DEPTH])
    y = gl.zeros([64, COLUMNS], gl.float32, layout=SUMS)
    stage = 0
    phase = 0
    last = 0
    for step in range(STEPS):
        mbarrier.wait(full.index(stage), phase)
        y = warpgroup_mma(
            weights.index(stage), x_memory.index(stage).permute((1, 0)), y, is_async=True
        )
        y = warpgroup_mma_wait(1, deps=[y])
        if step > 0:
            mbarrier.arrive(empty.index(last), count=1)  # the step before has been read
        last = stage
        stage, phase = next_stage(stage, phase, STAGES)
    return warpgroup_mma_wait(0, deps=[y])


@gluon_jit
def own_blocks(y: gl.tensor, BLOCKS: gl.constexpr) -> Any:
    """Of `[64, columns]` what each block of weights made of its own block of x, added up and turned
    over: `[columns / BLOCKS, 64 / BLOCKS]`."""
    if BLOCKS > 1:
        ROWS: gl.constexpr = y.shape[0] // BLOCKS
        COLUMNS: gl.constexpr = y.shape[1] // BLOCKS
        row = gl.arange(0, BLOCKS * ROWS, gl.SliceLayout(1, y.type.layout))[:, None]
        column = gl.arange(0, BLOCKS * COLUMNS, gl.SliceLayout(0, y.type.layout))[None, :]
        own = gl.where(row // ROWS == column // COLUMNS, y, 0.0)
        own = gl.reshape(own, [BLOCKS, ROWS, BLOCKS, COLUMNS])
        return gl.sum(gl.sum(own, axis=2), axis=0).permute((1, 0))
    else:
        return y.permute((1, 0))
