"""The walk of one program of `skinny_stream` over its tiles. In Gluon.

1. It fills the ring, and waits for the kernel in front.
2. It reads the rows of x: all blocks, where they are kept, or those of the first stage.
3. Each tile: the stages are multiplied as they arrive, each after the next one has been asked for;
   the sums of the warps are added and written, or sent to all ranks.
"""

from __future__ import annotations

from kernels.dispatch import gdc_launch_dependents, gdc_wait
from kernels.gluon_api import (
    fence_async_shared,
    gl,
    gluon_jit,
    gluon_jit_for_any,
    mbarrier,
    mma_v2,
)
from kernels.skinny_copies import start_stage
from kernels.skinny_input import all_blocks, read_blocks, scale_of_all
from kernels.skinny_operand import operand
from kernels.skinny_output import write, write_pairs
from kernels.skinny_peers import receive


@gluon_jit
def _block(
    ring: gl.shared_memory_descriptor, slot: gl.tensor, block: gl.constexpr, BITS: gl.constexpr
) -> gl.shared_memory_descriptor:
    return ring.index(slot).slice(block * 8, 8, dim=1 if BITS == 4 else 0)


@gluon_jit
def _multiply_stage(
    number: gl.tensor, first_block: gl.tensor, first_output: gl.tensor,
    ready: gl.shared_memory_descriptor, ring: gl.shared_memory_descriptor,
    up_ring: gl.shared_memory_descriptor, xs: gl.tuple, FIRST_X: gl.constexpr, sums: gl.tensor,
    up_sums: gl.tensor, zeros_ptr: gl.tensor, scales_ptr: gl.tensor, OUT: gl.constexpr,
    IN: gl.constexpr, BITS: gl.constexpr, STAGES: gl.constexpr, BLOCKS: gl.constexpr,
    GROUP: gl.constexpr, WORDS: gl.constexpr, GATED: gl.constexpr, LAYOUT: gl.constexpr,
) -> tuple[gl.tensor, gl.tensor]:  # fmt: skip
    """Wait for a stage and multiply it. Without a gate the two sums take turns, so that a product
    need not wait for the one before."""
    OUTPUTS: gl.constexpr = 2 * OUT if GATED else OUT
    slot = number % STAGES
    mbarrier.wait(ready.index(slot), number // STAGES & 1)
    for block in gl.static_range(BLOCKS):
        x = xs[FIRST_X + block]
        at = first_block + block * 8
        weights = operand(
            _block(ring, slot, block, BITS), zeros_ptr, scales_ptr, first_output, at, OUTPUTS,
            IN, BITS, GROUP, WORDS, LAYOUT,
        )  # fmt: skip
        if GATED:
            ups = operand(
                _block(up_ring, slot, block, BITS), zeros_ptr, scales_ptr, OUT + first_output,
                at, OUTPUTS, IN, BITS, GROUP, WORDS, LAYOUT,
            )  # fmt: skip
            sums = mma_v2(weights, x, sums)
            up_sums = mma_v2(ups, x, up_sums)
        elif block % 2 == 0:
            sums = mma_v2(weights, x, sums)
        else:
            up_sums = mma_v2(weights, x, up_sums)
    return sums, up_sums


@gluon_jit
def _multiply_tile(
    walked: gl.tensor, desc: gl.tensor, total: gl.tensor,
    ready: gl.shared_memory_descriptor, ring: gl.shared_memory_descriptor,
    up_ring: gl.shared_memory_descriptor, x_tile: gl.tensor, norm_tile: gl.tensor,
    place: gl.tensor, known: gl.tensor, scale: gl.tensor, xs: gl.tuple, sums: gl.tensor,
    up_sums: gl.tensor, zeros_ptr: gl.tensor, scales_ptr: gl.tensor, first_output: gl.tensor,
    OUT: gl.constexpr, IN: gl.constexpr, BITS: gl.constexpr, ROUNDS: gl.constexpr,
    STAGES: gl.constexpr, BLOCKS: gl.constexpr, GROUP: gl.constexpr, WORDS: gl.constexpr,
    GATED: gl.constexpr, PAIRED: gl.constexpr, KEEP: gl.constexpr, TYPE: gl.constexpr,
    LAYOUT: gl.constexpr,
) -> tuple[gl.tensor, gl.tensor, gl.tuple]:  # fmt: skip
    """All stages of a tile; each starts another before it waits for its own."""
    STEP: gl.constexpr = 8 * (128 if BITS == 8 else 64)
    RAGGED: gl.constexpr = IN % (STEP * BLOCKS) != 0
    if KEEP:
        for stage in gl.static_range(ROUNDS):
            number = walked * ROUNDS + stage
            start_stage(
                desc, number + STAGES - 1, total, ready, ring, up_ring, OUT, BITS, ROUNDS, STAGES,
                BLOCKS, GATED, PAIRED,
            )  # fmt: skip
            sums, up_sums = _multiply_stage(
                number, stage * BLOCKS * 8, first_output, ready, ring, up_ring, xs, stage * BLOCKS,
                sums, up_sums, zeros_ptr, scales_ptr, OUT, IN, BITS, STAGES, BLOCKS, GROUP, WORDS,
                GATED and not PAIRED, LAYOUT,
            )  # fmt: skip
    else:
        for stage in range(ROUNDS):
            number = walked * ROUNDS + stage
            start_stage(
                desc, number + STAGES - 1, total, ready, ring, up_ring, OUT, BITS, ROUNDS, STAGES,
                BLOCKS, GATED, PAIRED,
            )  # fmt: skip
            following = gl.where(stage + 1 < ROUNDS, stage + 1, 0) * (STEP * BLOCKS)
            next_xs = read_blocks(
                x_tile, norm_tile, place, following, known, scale, IN, RAGGED, TYPE, BLOCKS, STEP
            )
            sums, up_sums = _multiply_stage(
                number, stage * BLOCKS * 8, first_output, ready, ring, up_ring, xs, 0, sums,
                up_sums, zeros_ptr, scales_ptr, OUT, IN, BITS, STAGES, BLOCKS, GROUP, WORDS,
                GATED and not PAIRED, LAYOUT,
            )  # fmt: skip
            xs = next_xs
    return sums, up_sums, xs


@gluon_jit
def _first_blocks(
    x_tile: gl.tensor, norm_tile: gl.tensor, place: gl.tensor, known: gl.tensor, eps: gl.tensor,
    IN: gl.constexpr, BLOCKS: gl.constexpr, KEEP: gl.constexpr, ROUNDS: gl.constexpr,
    INPUTS: gl.constexpr, TYPE: gl.constexpr, NARROW: gl.constexpr,
) -> tuple[gl.tensor, gl.tuple]:  # fmt: skip
    """What rows of x are normed by, and their blocks: all that are kept, or those of a stage."""
    RAGGED: gl.constexpr = IN % (8 * INPUTS * BLOCKS) != 0
    scale = 1.0
    if KEEP:
        xs = all_blocks(
            x_tile, norm_tile, place, known, eps, IN, RAGGED, TYPE, ROUNDS * BLOCKS, 8 * INPUTS,
            NARROW,
        )  # fmt: skip
    else:
        if norm_tile is not None:
            scale = scale_of_all(
                x_tile, place, known, eps, IN, RAGGED, ROUNDS * BLOCKS, 8 * INPUTS, NARROW
            )
        xs = read_blocks(
            x_tile, norm_tile, place, 0, known, scale, IN, RAGGED, TYPE, BLOCKS, 8 * INPUTS
        )
    return scale, xs


@gluon_jit
def _walk(
    desc: gl.tensor, ready: gl.shared_memory_descriptor,
    ring: gl.shared_memory_descriptor, up_ring: gl.shared_memory_descriptor, tiles: gl.tensor,
    x_ptr: gl.tensor, scale_ptr: gl.tensor, bias_ptr: gl.tensor, norm_ptr: gl.tensor,
    residual_ptr: gl.tensor, zeros_ptr: gl.tensor, scales_ptr: gl.tensor, out_ptr: gl.tensor,
    inboxes_ptr: gl.tensor, epoch: gl.tensor, num_rows: gl.tensor, x_stride: gl.tensor,
    scale_stride: gl.tensor, eps: gl.tensor, OUT: gl.constexpr, IN: gl.constexpr,
    ROWS: gl.constexpr, BITS: gl.constexpr, RANK: gl.constexpr, SIZE: gl.constexpr,
    CAPACITY: gl.constexpr, STAGES: gl.constexpr, BLOCKS: gl.constexpr, GROUP: gl.constexpr,
    WORDS: gl.constexpr, GATED: gl.constexpr, PAIRED: gl.constexpr, KEEP: gl.constexpr,
    ROUNDS: gl.constexpr,
) -> None:  # fmt: skip
    """All tiles of this program."""
    INPUTS: gl.constexpr = 128 if BITS == 8 else 64
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [8, 1, 1], [1, 16, 8])
    WIDE: gl.constexpr = gl.DotOperandLayout(0, SUMS, INPUTS // 8)
    NARROW: gl.constexpr = gl.DotOperandLayout(1, SUMS, INPUTS // 8)
    RESULT: gl.constexpr = gl.SliceLayout(0, SUMS)
    place = gl.arange(0, INPUTS, gl.SliceLayout(0, gl.SliceLayout(2, NARROW)))[None, :, None]
    place += gl.arange(0, 8, gl.SliceLayout(1, gl.SliceLayout(2, NARROW)))[:, None, None] * INPUTS
    row = gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(1, NARROW)))[None, None, :]
    x_tile = x_ptr + row * x_stride + place
    norm_tile = None
    if norm_ptr is not None:
        norm_tile = norm_ptr + row * 0 + place
    TYPE: gl.constexpr = gl.float16 if BITS < 16 else x_ptr.dtype.element_ty
    FACTOR: gl.constexpr = 16.0 if norm_ptr is None and x_ptr.dtype.element_ty != TYPE else 1.0
    known = row < num_rows
    scale, xs = _first_blocks(
        x_tile, norm_tile, place, known, eps, IN, BLOCKS, KEEP, ROUNDS, INPUTS, TYPE, NARROW
    )
    row_out = gl.arange(0, ROWS, gl.SliceLayout(0, RESULT))[None, :]
    column = gl.arange(0, 16, gl.SliceLayout(1, RESULT))[:, None]
    for walked in range(tiles):
        first = (gl.program_id(0) + walked * gl.num_programs(0)) * (8 if PAIRED else 16)
        target = row_out * OUT + first + column
        mask_out = (first + column < OUT) & (row_out < num_rows)
        residual = None
        if residual_ptr is not None and not PAIRED:
            residual = gl.load(residual_ptr + target, mask=mask_out, other=0.0).to(gl.float32)
        sums = gl.zeros([8, 16, ROWS], gl.float32, SUMS)
        up_sums = gl.zeros([8, 16, ROWS], gl.float32, SUMS)
        sums, up_sums, xs = _multiply_tile(
            walked, desc, tiles * ROUNDS, ready, ring, up_ring, x_tile, norm_tile, place, known,
            scale, xs, sums, up_sums, zeros_ptr, scales_ptr, first, OUT, IN, BITS, ROUNDS, STAGES,
            BLOCKS, GROUP, WORDS, GATED, PAIRED, KEEP, TYPE, WIDE,
        )  # fmt: skip
        if PAIRED:
            write_pairs(
                sums + up_sums, FACTOR, scale_ptr, scale_stride, bias_ptr, residual_ptr, out_ptr,
                first, num_rows, OUT, ROWS, RESULT,
            )  # fmt: skip
        else:
            write(
                sums, up_sums, FACTOR, scale_ptr, scale_stride, bias_ptr, residual, out_ptr,
                first + column, target, mask_out, inboxes_ptr, epoch, OUT, GATED, RANK, SIZE,
                CAPACITY,
            )  # fmt: skip


@gluon_jit
def _make_ring(
    desc: gl.tensor, BITS: gl.constexpr, STAGES: gl.constexpr, BLOCKS: gl.constexpr,
    GATED: gl.constexpr, PAIRED: gl.constexpr,
) -> tuple[
    gl.shared_memory_descriptor, gl.shared_memory_descriptor, gl.shared_memory_descriptor
]:  # fmt: skip
    """Whether each stage is there, its weights, and those behind a gate where they lie apart."""
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    if PAIRED:
        LINE: gl.constexpr = 64 if BITS == 16 else 32
        LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16 if BITS == 16 else 32, 3)
        ring = gl.allocate_shared_memory(desc.dtype, [STAGES, 8 * BLOCKS, 16, LINE], LAYOUT)
    else:
        shape: gl.constexpr = [STAGES] + desc.block_type.shape  # noqa: RUF005
        ring = gl.allocate_shared_memory(desc.dtype, shape, desc.layout)
    up_ring = ring
    if GATED and not PAIRED:
        up_ring = gl.allocate_shared_memory(desc.dtype, shape, desc.layout)
    for slot in gl.static_range(STAGES):
        mbarrier.init(ready.index(slot), count=1)
    fence_async_shared()
    return ready, ring, up_ring


@gluon_jit_for_any("num_rows")
def stream_kernel(
    desc: gl.tensor, x_ptr: gl.tensor, scale_ptr: gl.tensor, bias_ptr: gl.tensor,
    norm_ptr: gl.tensor, residual_ptr: gl.tensor, zeros_ptr: gl.tensor, scales_ptr: gl.tensor,
    out_ptr: gl.tensor, inboxes_ptr: gl.tensor, epochs_ptr: gl.tensor, num_rows: gl.tensor,
    x_stride: gl.tensor, scale_stride: gl.tensor, eps: gl.tensor, OUT: gl.constexpr,
    IN: gl.constexpr, ROWS: gl.constexpr, BITS: gl.constexpr, RANK: gl.constexpr,
    SIZE: gl.constexpr, CAPACITY: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr,
    BLOCKS: gl.constexpr, GROUP: gl.constexpr, WORDS: gl.constexpr, GATED: gl.constexpr,
    PAIRED: gl.constexpr, KEEP: gl.constexpr, CHAINED: gl.constexpr,
) -> None:  # fmt: skip
    PER_ROUND: gl.constexpr = 8 * BLOCKS * (128 if BITS == 8 else 64)
    ROUNDS: gl.constexpr = (IN + PER_ROUND - 1) // PER_ROUND
    WIDTH: gl.constexpr = 8 if PAIRED else 16
    num_tiles = (OUT + WIDTH - 1) // WIDTH
    tiles = (num_tiles - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)
    ready, ring, up_ring = _make_ring(desc, BITS, STAGES, BLOCKS, GATED, PAIRED)
    for number in gl.static_range(STAGES - 1):
        start_stage(
            desc, number, tiles * ROUNDS, ready, ring, up_ring, OUT, BITS, ROUNDS, STAGES, BLOCKS,
            GATED, PAIRED,
        )  # fmt: skip
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    epoch = 0
    if SIZE > 1:
        epoch = gl.load(epochs_ptr + gl.program_id(0)) + 1
    _walk(
        desc, ready, ring, up_ring, tiles, x_ptr, scale_ptr, bias_ptr, norm_ptr, residual_ptr,
        zeros_ptr, scales_ptr, out_ptr, inboxes_ptr, epoch, num_rows, x_stride, scale_stride, eps,
        OUT, IN, ROWS, BITS, RANK, SIZE, CAPACITY, STAGES, BLOCKS, GROUP, WORDS, GATED, PAIRED,
        KEEP, ROUNDS,
    )  # fmt: skip
    if SIZE > 1:
        receive(
            out_ptr, num_rows, inboxes_ptr, epochs_ptr, epoch, OUT, ROWS, TILES, RANK, SIZE,
            CAPACITY,
        )  # fmt: skip
