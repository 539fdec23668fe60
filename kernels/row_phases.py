"""The products of `row_layer`, each over all tiles of a program. In Gluon.

What stands behind the sums of a tile (scales, bias, residual, rotation) is asked for before its
weights are walked.
"""

from __future__ import annotations

from typing import Any

from kernels.gluon_api import gl, gluon_jit
from kernels.row_walk import add_up, count_tiles, multiply_stage, sums_layout
from kernels.skinny_peers import send


@gluon_jit
def _scale(scale_ptr: gl.tensor, at: gl.tensor, mask: gl.tensor, factor: gl.tensor) -> gl.tensor:
    """What the sums of these outputs are multiplied by."""
    scale = gl.full(at.shape, 1.0, gl.float32, at.type.layout)
    if scale_ptr is not None:
        scale = gl.load(scale_ptr + at, mask=mask, other=0.0)
    return scale * factor


@gluon_jit
def _added(ptr: gl.tensor, at: gl.tensor, mask: gl.tensor) -> gl.tensor:
    """A bias or a residual; 0 where there is none."""
    added = gl.full(at.shape, 0.0, gl.float32, at.type.layout)
    if ptr is not None:
        added = gl.load(ptr + at, mask=mask, other=0.0, cache_modifier=".cg").to(gl.float32)
    return added


@gluon_jit
def _tile_sums(
    place: gl.tuple, walk: gl.tuple, UNITS: gl.constexpr, STAGES: gl.constexpr,
    BITS: gl.constexpr, OUTPUT: gl.constexpr,
) -> Any:  # fmt: skip
    """`[16]`, of the stages from `place` on, and the place behind them."""
    SUMS: gl.constexpr = sums_layout(BITS)
    sums = gl.zeros([128, 128 // BITS], gl.float32, SUMS)
    for unit in range(UNITS):
        sums, place = multiply_stage(sums, unit, place, walk, BITS, STAGES)
    return add_up(sums, BITS, OUTPUT), place


@gluon_jit
def _halves(y: gl.tensor, PAIRS: gl.constexpr) -> Any:
    """The two halves of a tile of `tiles_of_halves`, `[8]` each."""
    pairs = gl.permute(gl.reshape(y, [2, 8]), (1, 0))
    return gl.split(gl.convert_layout(pairs, PAIRS))


@gluon_jit
def plain_phase(
    place: gl.tuple, factor: gl.tensor, scale_ptr: gl.tensor, bias_ptr: gl.tensor,
    residual_ptr: gl.tensor, out_ptr: gl.tensor, walk: gl.tuple, peers: gl.tuple,
    OUT: gl.constexpr, UNITS: gl.constexpr, STAGES: gl.constexpr, BITS: gl.constexpr,
    RANK: gl.constexpr, SIZE: gl.constexpr, CAPACITY: gl.constexpr,
) -> gl.tuple:  # fmt: skip
    """out = x @ weight.T + bias + residual, the last two optional. Gives the place behind.

    With SIZE > 1 it goes to all ranks instead, residual and bias of the first one only. peers:
    inboxes, epoch.
    """
    OUTPUT: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    for walked in range(count_tiles(OUT)):
        tile = gl.program_id(0) + walked * gl.num_programs(0)
        at = tile * 16 + gl.arange(0, 16, OUTPUT)
        mask = at < OUT
        scale = _scale(scale_ptr, at, mask, factor)
        added = 0.0
        if RANK == 0:
            added = _added(residual_ptr, at, mask) + _added(bias_ptr, at, mask)
        y, place = _tile_sums(place, walk, UNITS, STAGES, BITS, OUTPUT)
        y = y * scale + added
        if SIZE > 1:
            send(y, at, mask, peers[0], peers[1], RANK, SIZE, CAPACITY)
        else:
            gl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=mask)
    return place


@gluon_jit
def _gates_in_turns(
    place: gl.tuple, factor: gl.tensor, scale_ptr: gl.tensor, out_ptr: gl.tensor,
    walk: gl.tuple, OUT: gl.constexpr, UNITS: gl.constexpr, STAGES: gl.constexpr,
    BITS: gl.constexpr,
) -> gl.tuple:  # fmt: skip
    """`gated_phase` where stages of the two take turns."""
    OUTPUT: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    SUMS: gl.constexpr = sums_layout(BITS)
    for walked in range(count_tiles(OUT)):
        tile = gl.program_id(0) + walked * gl.num_programs(0)
        at = tile * 16 + gl.arange(0, 16, OUTPUT)
        mask = at < OUT
        scale = _scale(scale_ptr, at, mask, factor)
        up_scale = _scale(scale_ptr, at + OUT, mask, factor)
        gates = gl.zeros([128, 128 // BITS], gl.float32, SUMS)
        ups = gl.zeros([128, 128 // BITS], gl.float32, SUMS)
        for unit in range(UNITS):
            gates, place = multiply_stage(gates, unit, place, walk, BITS, STAGES)
            ups, place = multiply_stage(ups, unit, place, walk, BITS, STAGES)
        y = add_up(gates, BITS, OUTPUT) * scale
        y = y / (1.0 + gl.exp(-y)) * (add_up(ups, BITS, OUTPUT) * up_scale)
        gl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=mask)
    return place


@gluon_jit
def _gates_in_pairs(
    place: gl.tuple, factor: gl.tensor, scale_ptr: gl.tensor, out_ptr: gl.tensor,
    walk: gl.tuple, OUT: gl.constexpr, UNITS: gl.constexpr, STAGES: gl.constexpr,
    BITS: gl.constexpr,
) -> gl.tuple:  # fmt: skip
    """`gated_phase` of `tiles_of_halves`."""
    OUTPUT: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    PAIRS: gl.constexpr = gl.BlockedLayout([1, 2], [8, 4], [8, 1], [1, 0])
    for walked in range(count_tiles(2 * OUT)):
        first = (gl.program_id(0) + walked * gl.num_programs(0)) * 8
        lane = gl.arange(0, 16, OUTPUT)
        at = lane // 8 * OUT + first + lane % 8
        scale = _scale(scale_ptr, at, at < 2 * OUT, factor)
        y, place = _tile_sums(place, walk, UNITS, STAGES, BITS, OUTPUT)
        gate, up = _halves(y * scale, PAIRS)
        y = gate / (1.0 + gl.exp(-gate)) * up
        column = first + gl.arange(0, 8, gl.SliceLayout(1, PAIRS))
        gl.store(out_ptr + column, y.to(out_ptr.dtype.element_ty))
    return place


@gluon_jit
def gated_phase(
    place: gl.tuple, factor: gl.tensor, scale_ptr: gl.tensor, out_ptr: gl.tensor,
    walk: gl.tuple, OUT: gl.constexpr, UNITS: gl.constexpr, STAGES: gl.constexpr,
    BITS: gl.constexpr, PAIRED: gl.constexpr,
) -> gl.tuple:  # fmt: skip
    """out = silu(gate) * up. Gives the place behind."""
    if PAIRED:
        return _gates_in_pairs(place, factor, scale_ptr, out_ptr, walk, OUT, UNITS, STAGES, BITS)
    else:
        return _gates_in_turns(place, factor, scale_ptr, out_ptr, walk, OUT, UNITS, STAGES, BITS)


@gluon_jit
def turning_phase(
    place: gl.tuple, factor: gl.tensor, scale_ptr: gl.tensor, bias_ptr: gl.tensor,
    out_ptr: gl.tensor, places: gl.tuple, walk: gl.tuple, OUT: gl.constexpr, UNITS: gl.constexpr,
    HALF: gl.constexpr, KV_HEADS: gl.constexpr, BLOCK_SIZE: gl.constexpr, STAGES: gl.constexpr,
    BITS: gl.constexpr,
) -> None:  # fmt: skip
    """Heads of `tiles_of_halves`: queries to out, turned, keys and values to their slot.

    places: pool, slot, position, table of cosines and sines, scales of keys and values.
    """
    kv_ptr, slot_ptr, position_ptr, cos_sin_ptr, kv_scales_ptr = places
    OUTPUT: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    PAIRS: gl.constexpr = gl.BlockedLayout([1, 2], [8, 4], [8, 1], [1, 0])
    HEADS: gl.constexpr = OUT // (2 * HALF) - 2 * KV_HEADS
    row_ptr = cos_sin_ptr + gl.load(position_ptr).to(gl.int64) * (2 * HALF)
    slot = gl.load(slot_ptr).to(gl.int64)
    for walked in range(count_tiles(OUT)):
        tile = gl.program_id(0) + walked * gl.num_programs(0)
        head, first = tile // (HALF // 8), tile % (HALF // 8) * 8
        lane = gl.arange(0, 16, OUTPUT)
        at = head * (2 * HALF) + lane // 8 * HALF + first + lane % 8
        scale = _scale(scale_ptr, at, at < OUT, factor)
        added = _added(bias_ptr, at, at < OUT)
        column = first + gl.arange(0, 8, gl.SliceLayout(1, PAIRS))
        turns = head < HEADS + KV_HEADS
        cos = gl.where(turns, gl.load(row_ptr + column), 1.0)
        sin = gl.where(turns, gl.load(row_ptr + HALF + column), 0.0)
        side = gl.maximum(head - HEADS, 0) // KV_HEADS
        kv_head = gl.maximum(head - HEADS, 0) % KV_HEADS
        kv_scale = 1.0
        if kv_scales_ptr is not None:
            kv_scale = gl.load(kv_scales_ptr + side * KV_HEADS + kv_head)
        y, place = _tile_sums(place, walk, UNITS, STAGES, BITS, OUTPUT)
        low, high = _halves(y * scale + added, PAIRS)
        low, high = low * cos - high * sin, high * cos + low * sin
        if head < HEADS:
            query_ptr = out_ptr + head * (2 * HALF) + column
            gl.store(query_ptr, low.to(out_ptr.dtype.element_ty))
            gl.store(query_ptr + HALF, high.to(out_ptr.dtype.element_ty))
        elif slot >= 0:
            if kv_scales_ptr is not None:
                low, high = _saturated(low / kv_scale), _saturated(high / kv_scale)
            block = (slot // BLOCK_SIZE * 2 + side) * KV_HEADS + kv_head
            token = (block * BLOCK_SIZE + slot % BLOCK_SIZE) * (2 * HALF)
            gl.store(kv_ptr + token + column, low.to(kv_ptr.dtype.element_ty))
            gl.store(kv_ptr + token + HALF + column, high.to(kv_ptr.dtype.element_ty))


@gluon_jit
def _saturated(x: gl.tensor) -> gl.tensor:
    """As `rope_store` saturates float8: NaN stays NaN."""
    return gl.where(x == x, gl.maximum(gl.minimum(x, 448.0), -448.0), x)
