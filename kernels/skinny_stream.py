"""Weights streamed through shared memory into tensor cores, for products of few rows. In Gluon.

1. One program per multiprocessor walks tiles of 16 outputs, each over all inputs, so nothing is
   summed between programs. The bulk copy engine fills a ring of stages; the program multiplies the
   oldest while the others are on their way, across the ends of tiles too. With a gate a tile is 8
   gates and the 8 outputs behind them (of four bits, where packing keeps these apart, 16 and 16).
2. A stage holds, for each of 8 warps, blocks of 16 outputs by 64 inputs (`skinny_operand`): warps
   share the inputs and add their sums at the end of a tile. The weights are the tensor cores' wide
   operand, the few rows of x the narrow one (8 columns).
3. Rows of x stay in registers for all tiles where they are few enough (`KEEP`); else each stage
   asks for the next one's before it waits for its own weights.
4. The ring is filled before the kernel in front has ended (`chained_launch`): in a decode step that
   is the time between two kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels.dispatch import (
    chained_launch,
    gdc_launch_dependents,
    gdc_wait,
    next_power_of_two,
    num_multiprocessors,
)
from kernels.gluon_api import gluon_jit, gluon_jit_for_any
from kernels.skinny_copies import start_stage
from kernels.skinny_input import all_blocks, read_blocks, scale_of_all
from kernels.skinny_operand import TILE_OUT, WARPS, descriptor, operand, word_layouts
from kernels.skinny_output import write, write_pairs
from kernels.skinny_peers import receive

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.ampere import mma_v2
    from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
except ImportError:  # no Triton, or one without Gluon
    gluon = None

if TYPE_CHECKING:
    from kernels.int4_packing import Int4Weight
    from kernels.peer_sum import PeerInboxes

_FP8 = torch.float8_e4m3fn
# Columns of the narrow operand; more would take registers that a stage's blocks of x need.
MAX_ROWS = 8
# Inputs up to which a program keeps x in registers: half of what it may have; with a norm, which
# needs x twice, a quarter.
_MAX_KEPT, _MAX_KEPT_NORMED = 7168, 4096


def can_stream(
    device: torch.device, in_size: int, weight_dtype: torch.dtype, *, gated_out: int = TILE_OUT
) -> bool:
    """Whether `stream` takes such weights (int32: four-bit ones); gated_out: half their outputs."""
    if gluon is None or device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    if weight_dtype == torch.int32:
        return in_size % 64 == 0 and gated_out % TILE_OUT == 0
    if weight_dtype == _FP8:
        return in_size % 128 == 0
    return weight_dtype in (torch.bfloat16, torch.float16) and in_size % 64 == 0


def stream(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    weight_scale: torch.Tensor | None = None,
    int4: Int4Weight | None = None,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    peers: PeerInboxes | None = None,
) -> None:
    """`skinny_linear` of 1 to MAX_ROWS rows. With int4, weight is its codes. With peers, who make
    the same call with their columns of the matrix, out is the sum over all ranks; not gated.

    Where weights become float16, x does too: normed, or else a sixteenth of it, which saturates
    from 1e6 on and loses what is below 1e-6.
    """
    num_rows, in_size = x.shape
    out_size = out.shape[1]
    bits = 4 if int4 is not None else 8 * weight.itemsize
    assert num_rows <= MAX_ROWS
    paired = gated and int4 is None
    stages, blocks = _ring(bits, in_size, gated and not paired)
    num_tiles = -(-out_size // (TILE_OUT // 2 if paired else TILE_OUT))
    num_programs = min(num_tiles, num_multiprocessors(x.device))
    chained = chained_launch(x.device)
    rank, size, capacity = (0, 1, 0) if peers is None else (peers.rank, peers.size, peers.capacity)
    assert peers is None or (num_rows * out_size <= capacity and num_programs <= len(peers.epochs))
    _stream_kernel[(num_programs,)](
        descriptor(weight, bits, blocks, paired=paired), x, weight_scale, bias, norm_weight,
        residual, None if int4 is None else int4.zeros, None if int4 is None else int4.scales, out,
        None if peers is None else peers.addresses, None if peers is None else peers.epochs,
        num_rows, x.stride(0),
        0 if weight_scale is None or len(weight_scale) == 1 else 1, eps,
        OUT=out_size, IN=in_size, ROWS=MAX_ROWS, BITS=bits, STAGES=stages, BLOCKS=blocks,
        GROUP=0 if int4 is None else int4.group_size, WORDS=word_layouts(bits)[1], GATED=gated,
        PAIRED=paired, RANK=rank, SIZE=size, CAPACITY=capacity,
        TILES=next_power_of_two(-(-num_tiles // num_programs)),
        KEEP=keeps_x(in_size, norm_weight is not None), CHAINED=chained, num_warps=WARPS,
        launch_pdl=chained,
    )  # fmt: skip


def keeps_x(in_size: int, is_normed: bool = True) -> bool:
    """Whether a program reads x once, not once for each tile of outputs."""
    return in_size <= (_MAX_KEPT_NORMED if is_normed else _MAX_KEPT)


def _ring(bits: int, in_size: int, two_rings: bool) -> tuple[int, int]:
    """Stages, and blocks of each warp in a stage: 192 KiB in all. Measured on an H200."""
    blocks = 8 if bits == 4 else 4
    per_warp = -(-in_size // (WARPS * (128 if bits == 8 else 64)))
    while blocks > 1 and per_warp % blocks:
        blocks //= 2
    stages = (48 if bits == 4 else 12) // blocks
    if not two_rings:
        return stages, blocks
    return (stages // 2, blocks) if stages > 3 else (stages, blocks // 2)


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
    walked: gl.tensor, desc: tma.tensor_descriptor, total: gl.tensor,
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
def _walk(
    desc: tma.tensor_descriptor, ready: gl.shared_memory_descriptor,
    ring: gl.shared_memory_descriptor, up_ring: gl.shared_memory_descriptor, tiles: gl.tensor,
    x_ptr: gl.tensor, scale_ptr: gl.tensor, bias_ptr: gl.tensor, norm_ptr: gl.tensor,
    residual_ptr: gl.tensor, zeros_ptr: gl.tensor, scales_ptr: gl.tensor, out_ptr: gl.tensor,
    inboxes_ptr: gl.tensor, epoch: gl.tensor, num_rows: gl.tensor,
    x_stride: gl.tensor, scale_stride: gl.tensor, eps: gl.tensor, OUT: gl.constexpr,
    IN: gl.constexpr, ROWS: gl.constexpr, BITS: gl.constexpr,
    RANK: gl.constexpr, SIZE: gl.constexpr, CAPACITY: gl.constexpr,
    STAGES: gl.constexpr, BLOCKS: gl.constexpr, GROUP: gl.constexpr, WORDS: gl.constexpr,
    GATED: gl.constexpr, PAIRED: gl.constexpr, KEEP: gl.constexpr, ROUNDS: gl.constexpr,
) -> None:  # fmt: skip
    """All tiles of this program."""
    INPUTS: gl.constexpr = 128 if BITS == 8 else 64
    RAGGED: gl.constexpr = IN % (8 * INPUTS * BLOCKS) != 0
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
    scale = 1.0
    if KEEP:
        xs = all_blocks(
            x_tile, norm_tile, place, known, eps, IN, RAGGED, TYPE, ROUNDS * BLOCKS, 8 * INPUTS,
            NARROW,
        )  # fmt: skip
    else:
        if norm_ptr is not None:
            scale = scale_of_all(
                x_tile, place, known, eps, IN, RAGGED, ROUNDS * BLOCKS, 8 * INPUTS, NARROW
            )
        xs = read_blocks(
            x_tile, norm_tile, place, 0, known, scale, IN, RAGGED, TYPE, BLOCKS, 8 * INPUTS
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


@gluon_jit_for_any("num_rows")
def _stream_kernel(
    desc: tma.tensor_descriptor, x_ptr: gl.tensor, scale_ptr: gl.tensor, bias_ptr: gl.tensor,
    norm_ptr: gl.tensor, residual_ptr: gl.tensor, zeros_ptr: gl.tensor, scales_ptr: gl.tensor,
    out_ptr: gl.tensor, inboxes_ptr: gl.tensor, epochs_ptr: gl.tensor,
    num_rows: gl.tensor, x_stride: gl.tensor,
    scale_stride: gl.tensor, eps: gl.tensor, OUT: gl.constexpr, IN: gl.constexpr,
    ROWS: gl.constexpr, BITS: gl.constexpr,
    RANK: gl.constexpr, SIZE: gl.constexpr, CAPACITY: gl.constexpr, TILES: gl.constexpr,
    STAGES: gl.constexpr, BLOCKS: gl.constexpr, GROUP: gl.constexpr, WORDS: gl.constexpr,
    GATED: gl.constexpr, PAIRED: gl.constexpr, KEEP: gl.constexpr, CHAINED: gl.constexpr,
) -> None:  # fmt: skip
    PER_ROUND: gl.constexpr = 8 * BLOCKS * (128 if BITS == 8 else 64)
    ROUNDS: gl.constexpr = (IN + PER_ROUND - 1) // PER_ROUND
    WIDTH: gl.constexpr = 8 if PAIRED else 16
    num_tiles = (OUT + WIDTH - 1) // WIDTH
    tiles = (num_tiles - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)
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
        zeros_ptr, scales_ptr, out_ptr, inboxes_ptr, epoch, num_rows, x_stride,
        scale_stride, eps, OUT, IN, ROWS, BITS, RANK, SIZE, CAPACITY, STAGES,
        BLOCKS, GROUP, WORDS, GATED, PAIRED, KEEP, ROUNDS,
    )  # fmt: skip
    if SIZE > 1:
        receive(
            out_ptr,
            num_rows,
            inboxes_ptr,
            epochs_ptr,
            epoch,
            OUT,
            ROWS,
            TILES,
            RANK,
            SIZE,
            CAPACITY,
        )
