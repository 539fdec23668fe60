"""One program's walk through the weights of several products of one row. In Gluon, for `row_layer`.

1. The matrices of all products are one sequence of stages of 16 KiB, in the order in which they are
   multiplied: tile after tile of 16 outputs, each over all inputs. A warp of its own asks for them.
   Where a product ends means nothing to it: the ring is as full of weights behind the end as
   before.
2. A stage is 8 blocks of inputs (128 bytes of each row) of 16 outputs. For the tensor cores these
   are 128 rows, which they read where they lie, FP8 too; the 8 blocks of x are their columns. Of
   the products of all rows with all columns the eighth that belongs together is added up.
3. FP8 multiplies FP8: x is the sum of two such numbers, the second a sixteenth (`row_input`).
   Within a stage sums are made in the tensor cores' fast mode, over the stages in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kernels.gluon_api import (
    Blocks,
    async_load,
    barrier,
    gl,
    gluon_constexpr,
    gluon_jit,
    mbarrier,
    next_stage,
    reinterpret,
    shared_layout,
    warpgroup_mma,
    warpgroup_mma_wait,
)

if TYPE_CHECKING:
    import torch

WARPS = 8
TILE_OUT = 16
# Blocks of inputs in a stage, and bytes of one.
BLOCKS, BLOCK_BYTES = 8, 128


def tiles_of(weight: torch.Tensor) -> Any:
    """A matrix for the bulk copy engine: `[blocks of inputs, outputs, inputs of a block]`."""
    inputs = BLOCK_BYTES // weight.itemsize
    out_size, row = weight.shape
    shape, strides = [row // inputs, out_size, inputs], [inputs, row, 1]
    shared = shared_layout(8 * weight.itemsize, 3)
    return Blocks(weight, shape, strides, [BLOCKS, TILE_OUT, inputs], shared)


def tiles_of_halves(weight: torch.Tensor, half: int) -> Any:
    """The same, but a tile is 8 outputs and the 8 that are `half` behind them: of a head, which
    turn together, or of gates and what they let through."""
    inputs = BLOCK_BYTES // weight.itemsize
    out_size, row = weight.shape
    shape = [row // inputs, out_size // (2 * half), 2, half, inputs]
    strides = [inputs, 2 * half * row, half * row, row, 1]
    shared = shared_layout(8 * weight.itemsize, 5)
    return Blocks(weight, shape, strides, [BLOCKS, 1, 2, TILE_OUT // 2, inputs], shared)


@gluon_constexpr
def sums_layout(bits: int) -> Any:
    """Of the sums of a tile, `[128, columns]`."""
    bits = int(getattr(bits, "value", bits))
    return gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 128 // bits, 256 // bits])


@gluon_constexpr
def units_of(in_size: int, bits: int) -> int:
    """Of a row: stages of a tile."""
    return -(-in_size // (8192 // bits))


@gluon_jit
def count_tiles(OUT: gl.constexpr) -> gl.tensor:
    """Of this program."""
    return ((OUT + 15) // 16 - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)


@gluon_jit
def send_all(
    descs: gl.tuple, memory: gl.tuple, OUTPUT_UNITS: gl.constexpr, HIDDEN: gl.constexpr,
    UNITS: gl.constexpr, INTER: gl.constexpr, PAIRED: gl.constexpr, DOWN_UNITS: gl.constexpr,
    LAST: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr,
) -> None:  # fmt: skip
    """The producer: a single warp that walks all matrices as fast as stages become free.

    descs: output, gate and up, down, and the last matrix of LAST outputs; by `tiles_of_halves` the
    second if PAIRED, the last where HALF is not 0. memory: barriers of full and of free stages, and
    the stages. Units: stages of a tile of each matrix.
    """
    place = (0, 1)
    tiles = count_tiles(HIDDEN)
    place = _send(descs[0], tiles, place, memory, OUTPUT_UNITS, STAGES)
    if PAIRED:
        place = _send_halves(descs[1], count_tiles(2 * INTER), place, memory, UNITS, INTER, STAGES)
    else:
        place = _send_gated(descs[1], count_tiles(INTER), place, memory, UNITS, INTER, STAGES)
    place = _send(descs[2], tiles, place, memory, DOWN_UNITS, STAGES)
    if HALF > 0:
        _send_halves(descs[3], count_tiles(LAST), place, memory, UNITS, HALF, STAGES)
    elif LAST > 0:
        _send(descs[3], count_tiles(LAST), place, memory, UNITS, STAGES)


@gluon_jit
def _free_stage(place: gl.tuple, memory: gl.tuple) -> Any:
    """The barrier and the memory of a stage whose weights are about to be sent."""
    full, free, ring = memory
    mbarrier.wait(free.index(place[0]), place[1])
    bar = full.index(place[0])
    mbarrier.expect(bar, 16384)
    return bar, ring.index(place[0])


@gluon_jit
def _send(
    desc: gl.tensor, tiles: gl.tensor, place: gl.tuple, memory: gl.tuple, UNITS: gl.constexpr,
    STAGES: gl.constexpr,
) -> gl.tuple:  # fmt: skip
    for walked in range(tiles):
        row = (gl.program_id(0) + walked * gl.num_programs(0)) * 16
        for unit in range(UNITS):
            bar, target = _free_stage(place, memory)
            async_load(desc, [unit * 8, row, 0], bar, target)
            place = next_stage(place[0], place[1], STAGES)
    return place


@gluon_jit
def _send_gated(
    desc: gl.tensor, tiles: gl.tensor, place: gl.tuple, memory: gl.tuple, UNITS: gl.constexpr,
    INTER: gl.constexpr, STAGES: gl.constexpr,
) -> gl.tuple:  # fmt: skip
    """Stages of a gate's tile and of the tile INTER outputs behind it take turns."""
    for walked in range(tiles):
        row = (gl.program_id(0) + walked * gl.num_programs(0)) * 16
        for unit in range(UNITS):
            bar, target = _free_stage(place, memory)
            async_load(desc, [unit * 8, row, 0], bar, target)
            place = next_stage(place[0], place[1], STAGES)
            bar, target = _free_stage(place, memory)
            async_load(desc, [unit * 8, row + INTER, 0], bar, target)
            place = next_stage(place[0], place[1], STAGES)
    return place


@gluon_jit
def _send_halves(
    desc: gl.tensor, tiles: gl.tensor, place: gl.tuple, memory: gl.tuple, UNITS: gl.constexpr,
    HALF: gl.constexpr, STAGES: gl.constexpr,
) -> gl.tuple:  # fmt: skip
    for walked in range(tiles):
        tile = gl.program_id(0) + walked * gl.num_programs(0)
        head, row = tile // (HALF // 8), tile % (HALF // 8) * 8
        for unit in range(UNITS):
            bar, target = _free_stage(place, memory)
            halves = reinterpret(target, target.dtype, desc.block_shape, desc.layout)
            async_load(desc, [unit * 8, head, 0, row, 0], bar, halves)
            place = next_stage(place[0], place[1], STAGES)
    return place


@gluon_jit
def multiply_stage(
    sums: gl.tensor, unit: gl.tensor, place: gl.tuple, walk: gl.tuple, BITS: gl.constexpr,
    STAGES: gl.constexpr,
) -> Any:  # fmt: skip
    """Adds the stage at `place` times a unit of x (8 blocks) to the sums, and frees it.

    walk: barriers of full and of free stages, the stages as rows, the units of x.
    """
    full, free, rows, x = walk
    weights, columns = rows.index(place[0]), x.index(unit).permute((1, 0))
    mbarrier.wait(full.index(place[0]), place[1])
    if BITS == 8:
        SUMS: gl.constexpr = sums_layout(BITS)
        part = gl.zeros([128, 128 // BITS], gl.float32, SUMS)
        part = warpgroup_mma(weights, columns, part, use_acc=False, is_async=True)
        sums += warpgroup_mma_wait(0, deps=[part])
    else:
        sums = warpgroup_mma(weights, columns, sums, is_async=True)
        sums = warpgroup_mma_wait(0, deps=[sums])
    barrier()
    mbarrier.arrive(free.index(place[0]), count=1)
    return sums, next_stage(place[0], place[1], STAGES)


@gluon_jit
def add_up(sums: gl.tensor, BITS: gl.constexpr, OUTPUT: gl.constexpr) -> gl.tensor:
    """`[16]`: what of each row belongs to its block of x, over all blocks."""
    SUMS: gl.constexpr = sums_layout(BITS)
    TERMS: gl.constexpr = 16 // BITS
    row = gl.arange(0, 128, gl.SliceLayout(1, SUMS))[:, None]
    column = gl.arange(0, 8 * TERMS, gl.SliceLayout(0, SUMS))[None, :]
    share = gl.where(column % TERMS == 0, 1.0, 0.0625)
    y = gl.sum(gl.where(row // 16 == column // TERMS, sums * share, 0.0), axis=1)
    return gl.convert_layout(gl.sum(gl.reshape(y, [8, 16]), axis=0), OUTPUT)
