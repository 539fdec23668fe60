"""Stages of weights, asked for early. In Gluon, for `skinny_stream`."""

from __future__ import annotations

from kernels.gluon_api import async_load, gl, gluon_jit, mbarrier, reinterpret


@gluon_jit
def start_stage(
    desc: gl.tensor, number: gl.tensor, total: gl.tensor,
    ready: gl.shared_memory_descriptor, ring: gl.shared_memory_descriptor,
    up_ring: gl.shared_memory_descriptor, OUT: gl.constexpr, BITS: gl.constexpr,
    ROUNDS: gl.constexpr, STAGES: gl.constexpr, BLOCKS: gl.constexpr, GATED: gl.constexpr,
    PAIRED: gl.constexpr,
) -> None:  # fmt: skip
    """Ask for stage `number` of this program's walk, unless the walk is over."""
    wanted = number < total
    tile = gl.program_id(0) + number // ROUNDS * gl.num_programs(0)
    slot = number % STAGES
    bar = ready.index(slot)
    mbarrier.expect(bar, (2 if GATED and not PAIRED else 1) * desc.block_type.nbytes, wanted)
    at = number % ROUNDS * (BLOCKS * 8)
    if PAIRED:
        shape: gl.constexpr = [STAGES] + desc.block_type.shape  # noqa: RUF005
        pairs = reinterpret(ring, desc.dtype, shape, desc.layout)
        async_load(desc, [at, 0, tile * 8, 0], bar, pairs.index(slot), wanted)
    else:
        _copy_stage(desc, tile, 0, at, bar, ring.index(slot), wanted, BITS)
        if GATED:
            _copy_stage(desc, tile, OUT, at, bar, up_ring.index(slot), wanted, BITS)


@gluon_jit
def _copy_stage(
    desc: gl.tensor, tile: gl.tensor, FIRST: gl.constexpr, at: gl.tensor,
    bar: gl.shared_memory_descriptor, target: gl.shared_memory_descriptor, wanted: gl.tensor,
    BITS: gl.constexpr,
) -> None:  # fmt: skip
    """Outputs from FIRST + 16 * tile, inputs from block `at`."""
    if BITS == 4:
        async_load(desc, [tile + FIRST // 16, at, 0], bar, target, wanted)
    else:
        async_load(desc, [at, tile * 16 + FIRST, 0], bar, target, wanted)
