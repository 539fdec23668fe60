"""One row as the narrow operand of `row_walk`: in shared memory, once for each program. In Gluon.

A unit is 8 blocks of inputs, each as long as 128 bytes of weights: `[8, inputs]`. Rows are normed
on the way. Beside FP8 weights a row becomes two numbers in FP8, the nearest one and the nearest one
to 16 times what is left, both of the row over its largest magnitude: 8 bits that count, as bfloat16
has.
"""

from __future__ import annotations

from kernels.gluon_api import barrier, fence_async_shared, gl, gluon_jit
from kernels.row_walk import units_of


@gluon_jit
def places_of_unit(BITS: gl.constexpr) -> gl.tensor:
    """`[8, inputs]`: which input of a unit each element is."""
    INPUTS: gl.constexpr = 1024 // BITS
    OWN: gl.constexpr = gl.BlockedLayout([1, INPUTS // 32], [1, 32], [8, 1], [1, 0])
    block = gl.arange(0, 8, gl.SliceLayout(1, OWN))[:, None]
    return block * INPUTS + gl.arange(0, INPUTS, gl.SliceLayout(0, OWN))[None, :]


@gluon_jit
def load_units(x_ptr: gl.tensor, place: gl.tensor, IN: gl.constexpr) -> gl.tuple:
    """All of a row, unit by unit, 0 past its end. place: of `places_of_unit`."""
    UNIT: gl.constexpr = place.shape[0] * place.shape[1]
    units: gl.tuple = ()
    for unit in gl.static_range((IN + UNIT - 1) // UNIT):
        at = unit * UNIT + place
        # Another multiprocessor may have written it while this kernel ran: not from its own cache.
        x = gl.load(x_ptr + at, mask=at < IN, other=0.0, cache_modifier=".cg")
        units = units + (x,)  # noqa: RUF005
    return units


@gluon_jit
def share_row(
    units: gl.tuple, norms: gl.tuple, target: gl.shared_memory_descriptor, eps: gl.tensor,
    IN: gl.constexpr, NORMED: gl.constexpr, BITS: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Puts the row where the tensor cores find it; returns what products with it are short of.

    norms: the norm's weight, unit by unit, if NORMED.
    """
    LAYOUT: gl.constexpr = units[0].type.layout
    UNITS: gl.constexpr = units_of(IN, BITS)
    squares = gl.full(units[0].shape, 0.0, gl.float32, LAYOUT)
    peaks = gl.full(units[0].shape, 0.0, gl.float32, LAYOUT)
    for unit in gl.static_range(UNITS):
        wide = units[unit].to(gl.float32)
        squares += wide * wide
        wide = _weighted(wide, norms, unit, NORMED)
        peaks = gl.maximum(peaks, gl.maximum(wide, -wide))
    scale = 1.0
    if NORMED:
        scale = gl.rsqrt(gl.sum(gl.sum(squares, 1), 0) / IN + eps)
    factor = 1.0
    if BITS == 8:
        peak = gl.maximum(gl.max(gl.max(peaks, 1), 0), 1e-30)
        factor = scale * peak / 448.0
        scale = 448.0 / peak
    for unit in gl.static_range(UNITS):
        wide = _weighted(units[unit].to(gl.float32), norms, unit, NORMED) * scale
        _put(wide, target.index(unit), BITS)
    fence_async_shared()
    barrier()
    return factor


@gluon_jit
def _weighted(
    wide: gl.tensor, norms: gl.tuple, unit: gl.constexpr, NORMED: gl.constexpr
) -> gl.tensor:
    if NORMED:
        wide = wide * norms[unit].to(gl.float32)
    return wide


@gluon_jit
def _put(wide: gl.tensor, target: gl.shared_memory_descriptor, BITS: gl.constexpr) -> None:
    """A unit; two columns for each block beside FP8."""
    if BITS == 8:
        # FP8's four bits, rounded by hand: Triton 3.6 loses every other pair on the way back.
        bits = wide.to(gl.int32, bitcast=True) + 0x80000 & -0x100000
        high = bits.to(gl.float32, bitcast=True)
        low = (wide - high) * 16.0
        pairs = gl.permute(gl.join(high.to(gl.float8e4nv), low.to(gl.float8e4nv)), (0, 2, 1))
        target.store(gl.reshape(pairs, [2 * wide.shape[0], wide.shape[1]]))
    else:
        target.store(wide.to(target.dtype))
