"""What one program of `pair_mlp` does: a warp copies, two warpgroups multiply. In Gluon.

A stage of shared memory holds 64 inner elements of 128 rows, which are those of x or of what was
activated, and of 256 weight rows, which are gates and ups or rows of the second matrix.
"""

from __future__ import annotations

from kernels.gluon_api import (
    async_load,
    async_store,
    barrier,
    fence_async_shared,
    gl,
    gluon_jit,
    gluon_jit_for_any,
    mbarrier,
    next_stage,
    reinterpret,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon_jit
def _part_of(
    INTER: gl.constexpr, PROGRAMS: gl.constexpr, TILES: gl.constexpr, FRONT: gl.constexpr,
    PARTS: gl.constexpr,
) -> tuple[gl.tensor, ...]:  # fmt: skip
    """Of this program: its part and tile, and two stretches of blocks of inner elements, each by
    its first block and its length. Those of the first are made before the last round of gates."""
    BLOCKS: gl.constexpr = INTER // 128
    FULL: gl.constexpr = 2 * BLOCKS % PROGRAMS  # so many programs have one tile of gates more
    EARLY: gl.constexpr = max(FRONT, (2 * BLOCKS - FULL) // 2)
    program = gl.program_id(0)
    late = gl.where(program < FULL, program, program - TILES)
    part = PARTS - late // TILES
    first = FRONT + (part - 1) * (EARLY - FRONT) // PARTS
    num_first = FRONT + part * (EARLY - FRONT) // PARTS - first
    before = (part - 1) * (BLOCKS - FRONT) // PARTS
    second = EARLY + before - (first - FRONT)
    num_second = part * (BLOCKS - FRONT) // PARTS - before - num_first
    is_front = (program >= FULL) & (program < FULL + TILES)
    part = gl.where(is_front, 0, part)
    tile = gl.where(is_front, program - FULL, late % TILES)
    first = gl.where(is_front, 0, first)
    works = is_front | (late < PARTS * TILES)
    num_first = gl.where(is_front, FRONT, gl.where(works, num_first, 0))
    num_second = gl.where(is_front | (late >= PARTS * TILES), 0, num_second)
    return part, tile, first, num_first, second, num_second


@gluon_jit
def _seen(ptrs: gl.tensor) -> gl.tensor:
    """A counter, and order: what was told before it is there for the copies that follow."""
    return gl.inline_asm_elementwise(
        "ld.acquire.gpu.global.b32 $0, [$1]; fence.proxy.async.global;",
        "=r,l", [ptrs], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon_jit
def _await(counter_ptr: gl.tensor, target: gl.tensor) -> None:
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    ptrs = counter_ptr + gl.zeros([1], gl.int32, layout=LAYOUT)
    seen = gl.sum(_seen(ptrs), axis=0)
    while seen - target < 0:
        seen = gl.sum(_seen(ptrs), axis=0)


@gluon_jit
def _tell(counter_ptr: gl.tensor) -> None:
    """What this warpgroup has stored is in memory for all who see the counter grow."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    nothing = gl.zeros([128], gl.int32, layout=LAYOUT)
    gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; fence.proxy.async.global; mov.b32 $0, $1;",
        "=r,r", [nothing], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    barrier()
    gl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")


@gluon_jit
def _send_gates(
    x_desc: gl.tensor, gate_desc: gl.tensor, up_desc: gl.tensor, memory: gl.tuple,
    HIDDEN: gl.constexpr, INTER: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr,
) -> gl.tuple:  # fmt: skip
    """All of the first product, for the walks to come; the place behind it."""
    x_memory, halves, full, empty = memory
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), 2 * INTER // 128, PROGRAMS):
        row = tile % 2 * 128
        column = tile // 2 * 128
        for step in range(HIDDEN // 64):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, 49152)
            k = step * 64
            async_load(x_desc, [row, k], bar, x_memory.index(2 * stage))
            async_load(x_desc, [row + 64, k], bar, x_memory.index(2 * stage + 1))
            async_load(gate_desc, [column, k], bar, halves.index(2 * stage))
            async_load(up_desc, [column, k], bar, halves.index(2 * stage + 1))
            stage, phase = next_stage(stage, phase, STAGES)
    return (stage, phase)


@gluon_jit
def _copy(
    x_desc: gl.tensor, gate_desc: gl.tensor, up_desc: gl.tensor, activated_desc: gl.tensor,
    down_desc: gl.tensor, counters_ptr: gl.tensor, x_memory: gl.shared_memory_descriptor,
    weights: gl.shared_memory_descriptor, full: gl.shared_memory_descriptor,
    empty: gl.shared_memory_descriptor, HIDDEN: gl.constexpr, INTER: gl.constexpr,
    PROGRAMS: gl.constexpr, TILES: gl.constexpr, FRONT: gl.constexpr, PARTS: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:  # fmt: skip
    epoch_ptr = counters_ptr + 2 * INTER // 128 + gl.program_id(0)
    epoch = gl.load(epoch_ptr) + 1
    halves = reinterpret(weights, weights.dtype, [2 * STAGES, 128, 64], gate_desc.layout)
    stage, phase = _send_gates(
        x_desc, gate_desc, up_desc, (x_memory, halves, full, empty), HIDDEN, INTER, PROGRAMS, STAGES
    )
    _, tile, first, num_first, second, num_second = _part_of(INTER, PROGRAMS, TILES, FRONT, PARTS)
    row = tile % 2 * 128
    column = tile // 2 * 256
    made_ptr = counters_ptr + tile % 2 * (INTER // 128)
    for step in range(2 * (num_first + num_second)):
        mbarrier.wait(empty.index(stage), phase)
        bar = full.index(stage)
        mbarrier.expect(bar, 49152)
        walked = step // 2
        block = gl.where(walked < num_first, first + walked, second + walked - num_first)
        k = block * 128 + step % 2 * 64
        async_load(down_desc, [column, k], bar, halves.index(2 * stage))
        async_load(down_desc, [column + 128, k], bar, halves.index(2 * stage + 1))
        if step % 2 == 0:
            _await(made_ptr + block, 2 * epoch)
        async_load(activated_desc, [row, k], bar, x_memory.index(2 * stage))
        async_load(activated_desc, [row + 64, k], bar, x_memory.index(2 * stage + 1))
        stage, phase = next_stage(stage, phase, STAGES)
    gl.store(epoch_ptr, epoch)


@gluon_jit
def _walk(
    half: gl.constexpr, steps: gl.tensor, place: gl.tuple, x_memory: gl.shared_memory_descriptor,
    weights: gl.shared_memory_descriptor, full: gl.shared_memory_descriptor,
    empty: gl.shared_memory_descriptor, STAGES: gl.constexpr,
) -> tuple[gl.tensor, gl.tuple]:  # fmt: skip
    """The sums of a tile, 64 rows by 256 columns, over so many stages, and the place behind."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    sums = gl.zeros([64, 256], gl.float32, layout=SUMS)
    stage, phase = place
    mbarrier.wait(full.index(stage), phase)
    sums = warpgroup_mma(
        x_memory.index(2 * stage + half), weights.index(stage).permute((1, 0)), sums,
        use_acc=False, is_async=True,
    )  # fmt: skip
    sums = warpgroup_mma_wait(1, deps=[sums])
    last = stage
    stage, phase = next_stage(stage, phase, STAGES)
    for _ in range(1, steps):
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
    return sums, (stage, phase)


@gluon_jit
def _multiply(
    half: gl.constexpr, out_desc: gl.tensor, parts_ptr: gl.tensor, counters_ptr: gl.tensor,
    num_rows: gl.tensor, x_memory: gl.shared_memory_descriptor,
    weights: gl.shared_memory_descriptor, out_memory: gl.shared_memory_descriptor,
    full: gl.shared_memory_descriptor, empty: gl.shared_memory_descriptor, HIDDEN: gl.constexpr,
    INTER: gl.constexpr, PROGRAMS: gl.constexpr, TILES: gl.constexpr, FRONT: gl.constexpr,
    PARTS: gl.constexpr, STAGES: gl.constexpr,
) -> None:  # fmt: skip
    staged = out_memory.index(half)
    place = (0, 0)
    for tile in range(gl.program_id(0), 2 * INTER // 128, PROGRAMS):
        sums, place = _walk(half, HIDDEN // 64, place, x_memory, weights, full, empty, STAGES)
        gate, up = gl.split(sums.reshape([64, 2, 128]).permute((0, 2, 1)))
        activated = gate * up / (1.0 + gl.exp(-gate))
        staged.store(activated.to(staged.dtype))
        fence_async_shared()
        barrier()
        async_store(out_desc, [tile % 2 * 128 + half * 64, tile // 2 * 128], staged)
        _tell(counters_ptr + tile % 2 * (INTER // 128) + tile // 2)
    part, tile, _, num_first, _, num_second = _part_of(INTER, PROGRAMS, TILES, FRONT, PARTS)
    blocks = num_first + num_second
    if blocks > 0:
        sums, place = _walk(half, 2 * blocks, place, x_memory, weights, full, empty, STAGES)
        row = tile % 2 * 128 + half * 64
        out_ptr = parts_ptr + (part.to(gl.int64) * num_rows + row) * HIDDEN + tile // 2 * 256
        low, high = gl.split(sums.reshape([64, 2, 128]).permute((0, 2, 1)))
        _store_part(out_ptr, low, num_rows - row, HIDDEN)
        _store_part(out_ptr + 128, high, num_rows - row, HIDDEN)


@gluon_jit
def _store_part(
    out_ptr: gl.tensor, sums: gl.tensor, num_rows: gl.tensor, HIDDEN: gl.constexpr
) -> None:
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    sums = gl.convert_layout(sums, LAYOUT)  # nothing moves
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))[:, None]
    column = gl.arange(0, 128, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    sums = sums.to(out_ptr.dtype.element_ty)
    gl.store(out_ptr + row * HIDDEN + column, sums, mask=row < num_rows)


@gluon_jit_for_any("num_rows")
def pair_kernel(
    x_desc: gl.tensor, gate_desc: gl.tensor, up_desc: gl.tensor, out_desc: gl.tensor,
    activated_desc: gl.tensor, down_desc: gl.tensor, parts_ptr: gl.tensor,
    counters_ptr: gl.tensor, num_rows: gl.tensor, HIDDEN: gl.constexpr, INTER: gl.constexpr,
    PROGRAMS: gl.constexpr, TILES: gl.constexpr, FRONT: gl.constexpr, PARTS: gl.constexpr,
    STAGES: gl.constexpr, num_warps: gl.constexpr,
) -> None:  # fmt: skip
    DTYPE: gl.constexpr = x_desc.dtype
    TILED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    x_memory = gl.allocate_shared_memory(DTYPE, [2 * STAGES, 64, 64], TILED)
    weights = gl.allocate_shared_memory(DTYPE, [STAGES, 256, 64], TILED)
    out_memory = gl.allocate_shared_memory(DTYPE, [2, 64, 128], TILED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply, (gl.constexpr(0), out_desc, parts_ptr, counters_ptr, num_rows, x_memory,
                weights, out_memory, full, empty, HIDDEN, INTER, PROGRAMS, TILES, FRONT, PARTS,
                STAGES)),
            (_multiply, (gl.constexpr(1), out_desc, parts_ptr, counters_ptr, num_rows, x_memory,
                weights, out_memory, full, empty, HIDDEN, INTER, PROGRAMS, TILES, FRONT, PARTS,
                STAGES)),
            (_copy, (x_desc, gate_desc, up_desc, activated_desc, down_desc, counters_ptr, x_memory,
                weights, full, empty, HIDDEN, INTER, PROGRAMS, TILES, FRONT, PARTS, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
