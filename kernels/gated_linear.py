"""The first half of an MLP as one product: `silu(x @ gate.T) * (x @ up.T)`, on Hopper GPUs.

For prompts and batches of 256, where a product is bound by arithmetic: a product of its own and
`silu_mul` behind it write and read `[num_rows, 2 * intermediate]` once more, 0.17 of 2.96 ms for
8192 rows of an 8B model, which this saves. Fewer rows are `skinny_linear`'s and
`thin_gated_linear`'s; a batch of 256 is `pair_mlp`'s, where that knows the matrices.

Life of a thread block (one per multiprocessor, for the whole launch)
    1. It takes every n-th tile of the result, 128 rows by 128 columns, in an order in which blocks
       at work at the same time share rows and weights in the second-level cache.
    2. One warp copies, 64 elements of the inner dimension at a time, 128 rows of x and 128 of gate
       and up each into shared memory, as many steps ahead as there are stages, also into the next
       tile.
    3. Two warpgroups of 64 rows each multiply. A thread holds the sums of gate and up of the same
       element, so the activation happens in registers; the result leaves through shared memory
       while the next tile is at work. As the two need not keep step, one's products run beside the
       other's activation.

What hangs over the edges of x or of the weights reads as zero and is not written.
"""

from __future__ import annotations

import torch

from kernels.dispatch import is_hopper, num_multiprocessors
from kernels.gluon_api import (
    HAS_GLUON,
    async_load,
    async_store,
    barrier,
    fence_async_shared,
    gl,
    gluon_jit,
    gluon_jit_for_any,
    in_blocks,
    mbarrier,
    next_stage,
    reinterpret,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

_ROWS, _COLUMNS, _DEPTH = 128, 128, 64  # of a tile, and of a step through it
_STAGES = 4
_ROWS_AT_ONCE = 8  # tiles of x that neighbouring blocks work through together
# Part of the multiprocessors' time that must go into wanted elements; the library picks the size
# of its tiles to suit, these are always the same. A batch of two tiles has little else to share.
_LEAST_USE, _LEAST_USE_OF_PAIR = 0.9, 0.84


def fits_gated_linear(num_rows: int, weight: torch.Tensor) -> bool:
    """Whether `gated_linear` runs here and beats the library's product with `silu_mul` behind."""
    if not HAS_GLUON or not weight.is_cuda or weight.dtype not in (torch.bfloat16, torch.float16):
        return False
    if not is_hopper(weight.device) or weight.shape[1] % 8:
        return False
    columns = weight.shape[0] // 2
    tiles = -(-num_rows // _ROWS) * -(-columns // _COLUMNS)
    waves = -(-tiles // num_multiprocessors(weight.device))
    places = waves * num_multiprocessors(weight.device) * _ROWS * _COLUMNS
    is_pair = _ROWS < num_rows <= 2 * _ROWS
    return num_rows * columns >= (_LEAST_USE_OF_PAIR if is_pair else _LEAST_USE) * places


def gated_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` with gate, up the halves of `x @ weight.T`: `[num_rows, intermediate]`.

    x: `[num_rows, in_size]`, num_rows > 0; weight: `[2 * intermediate, in_size]`, gate first; both
    contiguous, bfloat16 or float16, in_size a multiple of 8. Summed and activated in float32.
    Needs a GPU of compute capability 9, see `fits_gated_linear`.
    """
    assert x.is_contiguous()
    assert weight.is_contiguous()
    assert x.dtype == weight.dtype
    assert x.shape[1] == weight.shape[1]
    num_rows, in_size = x.shape
    columns = weight.shape[0] // 2
    out = torch.empty(num_rows, columns, dtype=x.dtype, device=x.device)
    grid = num_multiprocessors(x.device)
    _gated_kernel[(grid,)](
        in_blocks(x, _ROWS // 2, _DEPTH), in_blocks(weight[:columns], _COLUMNS, _DEPTH),
        in_blocks(weight[columns:], _COLUMNS, _DEPTH), in_blocks(out, _ROWS // 2, _COLUMNS),
        num_rows, COLUMNS=columns, STEPS=-(-in_size // _DEPTH), GRID=grid, STAGES=_STAGES,
        TILE_ROWS=_ROWS, TILE_COLUMNS=_COLUMNS, DEPTH=_DEPTH, AT_ONCE=_ROWS_AT_ONCE,
        num_warps=4, maxnreg=168,
    )  # fmt: skip
    return out


@gluon_jit
def _place(
    tile: gl.tensor, tiles_down: gl.tensor, tiles_across: gl.constexpr, AT_ONCE: gl.constexpr
) -> tuple[gl.tensor, gl.tensor]:
    """Row and column of a tile: down `AT_ONCE` rows, then the next column."""
    band = tile // (AT_ONCE * tiles_across)
    height = gl.minimum(tiles_down - band * AT_ONCE, AT_ONCE)
    rest = tile % (AT_ONCE * tiles_across)
    return band * AT_ONCE + rest % height, rest // height


@gluon_jit
def _copy(
    x_desc: gl.tensor, gate_desc: gl.tensor,
    up_desc: gl.tensor, x_memory: gl.shared_memory_descriptor,
    weights: gl.shared_memory_descriptor, full: gl.shared_memory_descriptor,
    empty: gl.shared_memory_descriptor, tiles_down: gl.tensor, TILES_ACROSS: gl.constexpr,
    STEPS: gl.constexpr, GRID: gl.constexpr, STAGES: gl.constexpr, TILE_ROWS: gl.constexpr,
    TILE_COLUMNS: gl.constexpr, DEPTH: gl.constexpr, AT_ONCE: gl.constexpr,
) -> None:  # fmt: skip
    halves = reinterpret(
        weights, weights.dtype, [2 * STAGES, TILE_COLUMNS, DEPTH], gate_desc.layout
    )
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), tiles_down * TILES_ACROSS, GRID):
        down, across = _place(tile, tiles_down, TILES_ACROSS, AT_ONCE)
        row = down * TILE_ROWS
        column = across * TILE_COLUMNS
        for step in range(STEPS):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, (TILE_ROWS + 2 * TILE_COLUMNS) * DEPTH * 2)
            k = step * DEPTH
            for half in gl.static_range(2):
                async_load(
                    x_desc,
                    [row + half * (TILE_ROWS // 2), k],
                    bar,
                    x_memory.index(2 * stage + half),
                )
            async_load(gate_desc, [column, k], bar, halves.index(2 * stage))
            async_load(up_desc, [column, k], bar, halves.index(2 * stage + 1))
            stage, phase = next_stage(stage, phase, STAGES)


@gluon_jit
def _multiply(
    half: gl.constexpr, out_desc: gl.tensor, x_memory: gl.shared_memory_descriptor,
    weights: gl.shared_memory_descriptor, out_memory: gl.shared_memory_descriptor,
    full: gl.shared_memory_descriptor, empty: gl.shared_memory_descriptor, tiles_down: gl.tensor,
    TILES_ACROSS: gl.constexpr, STEPS: gl.constexpr, GRID: gl.constexpr, STAGES: gl.constexpr,
    TILE_ROWS: gl.constexpr, TILE_COLUMNS: gl.constexpr, AT_ONCE: gl.constexpr,
) -> None:  # fmt: skip
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * TILE_COLUMNS, 16])
    HALF: gl.constexpr = TILE_ROWS // 2
    staged = out_memory.index(half)
    zero = gl.zeros([HALF, 2 * TILE_COLUMNS], gl.float32, layout=SUMS)
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), tiles_down * TILES_ACROSS, GRID):
        down, across = _place(tile, tiles_down, TILES_ACROSS, AT_ONCE)
        mbarrier.wait(full.index(stage), phase)
        sums = warpgroup_mma(
            x_memory.index(2 * stage + half), weights.index(stage).permute((1, 0)), zero,
            use_acc=False, is_async=True,
        )  # fmt: skip
        sums = warpgroup_mma_wait(1, deps=[sums])
        last = stage
        stage, phase = next_stage(stage, phase, STAGES)
        for _ in range(1, STEPS):
            mbarrier.wait(full.index(stage), phase)
            sums = warpgroup_mma(
                x_memory.index(2 * stage + half), weights.index(stage).permute((1, 0)), sums,
                is_async=True,
            )  # fmt: skip
            sums = warpgroup_mma_wait(1, deps=[sums])  # the step before has been read
            mbarrier.arrive(empty.index(last), count=1)
            last = stage
            stage, phase = next_stage(stage, phase, STAGES)
        sums = warpgroup_mma_wait(0, deps=[sums])
        mbarrier.arrive(empty.index(last), count=1)
        gate, up = gl.split(sums.reshape([HALF, 2, TILE_COLUMNS]).permute((0, 2, 1)))
        activated = gate * up / (1.0 + gl.exp(-gate))
        tma.store_wait(0)  # what the tile before left there has been read
        staged.store(activated.to(staged.dtype))
        fence_async_shared()
        barrier()
        async_store(out_desc, [down * TILE_ROWS + half * HALF, across * TILE_COLUMNS], staged)
    tma.store_wait(0)


@gluon_jit_for_any("num_rows")
def _gated_kernel(
    x_desc: gl.tensor, gate_desc: gl.tensor,
    up_desc: gl.tensor, out_desc: gl.tensor, num_rows: gl.tensor,
    COLUMNS: gl.constexpr, STEPS: gl.constexpr, GRID: gl.constexpr, STAGES: gl.constexpr,
    TILE_ROWS: gl.constexpr, TILE_COLUMNS: gl.constexpr, DEPTH: gl.constexpr,
    AT_ONCE: gl.constexpr, num_warps: gl.constexpr,
) -> None:  # fmt: skip
    DTYPE: gl.constexpr = x_desc.dtype
    TILED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    TILES_ACROSS: gl.constexpr = (COLUMNS + TILE_COLUMNS - 1) // TILE_COLUMNS
    HALF: gl.constexpr = TILE_ROWS // 2
    x_memory = gl.allocate_shared_memory(DTYPE, [2 * STAGES, HALF, DEPTH], TILED)
    weights = gl.allocate_shared_memory(DTYPE, [STAGES, 2 * TILE_COLUMNS, DEPTH], TILED)
    out_memory = gl.allocate_shared_memory(DTYPE, [2, HALF, TILE_COLUMNS], TILED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    tiles_down = (num_rows + TILE_ROWS - 1) // TILE_ROWS
    gl.warp_specialize(
        [
            (_multiply, (gl.constexpr(0), out_desc, x_memory, weights, out_memory, full, empty,
                tiles_down, TILES_ACROSS, STEPS, GRID, STAGES, TILE_ROWS, TILE_COLUMNS, AT_ONCE)),
            (_multiply, (gl.constexpr(1), out_desc, x_memory, weights, out_memory, full, empty,
                tiles_down, TILES_ACROSS, STEPS, GRID, STAGES, TILE_ROWS, TILE_COLUMNS, AT_ONCE)),
            (_copy, (x_desc, gate_desc, up_desc, x_memory, weights, full, empty, tiles_down,
                TILES_ACROSS, STEPS, GRID, STAGES, TILE_ROWS, TILE_COLUMNS, DEPTH, AT_ONCE)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
