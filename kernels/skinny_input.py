"""The few rows of x as the tensor cores' narrow operand. In Gluon, for `skinny_stream`.

Blocks are `[warps, inputs of a block, rows]`, like those of the weights. Rows are normed on the
way and rounded once. Where weights become float16 x does too: normed rows fit; of others a
sixteenth is taken, which saturates from 1e6 on and loses what is below 1e-6.
"""

from __future__ import annotations

from kernels.gluon_api import gl, gluon_jit


@gluon_jit
def _load_x(
    tile: gl.tensor, place: gl.tensor, first: gl.tensor, mask: gl.tensor, IN: gl.constexpr,
    RAGGED: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """A block of x or of the norm's weight; 0 past its end."""
    if RAGGED:
        mask = mask & (place + first < IN)
    return gl.load(tile + first, mask=mask, other=0.0)


@gluon_jit
def _prepared(
    x: gl.tensor, norm_tile: gl.tensor, place: gl.tensor, first: gl.tensor, mask: gl.tensor,
    scale: gl.tensor, IN: gl.constexpr, RAGGED: gl.constexpr, TYPE: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """A block of x as it is multiplied: normed, in the operand's type."""
    if norm_tile is not None:
        weight = _load_x(norm_tile, place, first, mask, IN, RAGGED).to(gl.float32)
        x = (x.to(gl.float32) * scale * weight).to(TYPE)
    elif x.dtype != TYPE:
        x = gl.maximum(gl.minimum(x.to(gl.float32) * 0.0625, 65504.0), -65504.0).to(TYPE)
    return x


@gluon_jit
def read_blocks(
    x_tile: gl.tensor, norm_tile: gl.tensor, place: gl.tensor, first: gl.tensor, mask: gl.tensor,
    scale: gl.tensor, IN: gl.constexpr, RAGGED: gl.constexpr, TYPE: gl.constexpr,
    BLOCKS: gl.constexpr, STEP: gl.constexpr,
) -> gl.tuple:  # fmt: skip
    """A tuple of blocks, STEP inputs apart."""
    xs: gl.tuple = ()
    for block in gl.static_range(BLOCKS):
        at = first + block * STEP
        x = _load_x(x_tile, place, at, mask, IN, RAGGED)
        x = _prepared(x, norm_tile, place, at, mask, scale, IN, RAGGED, TYPE)
        xs = xs + (x,)  # noqa: RUF005
    return xs


@gluon_jit
def _norm_scale(
    squares: gl.tensor, eps: gl.tensor, IN: gl.constexpr, NARROW: gl.constexpr
) -> gl.tensor:
    """`[1, 1, rows]` from the sums of each thread."""
    total = gl.sum(gl.sum(squares, axis=1), axis=0)
    scale = gl.rsqrt(total / IN + eps)
    return gl.convert_layout(scale, gl.SliceLayout(0, gl.SliceLayout(1, NARROW)))[None, None, :]


@gluon_jit
def all_blocks(
    x_tile: gl.tensor, norm_tile: gl.tensor, place: gl.tensor, mask: gl.tensor, eps: gl.tensor,
    IN: gl.constexpr, RAGGED: gl.constexpr, TYPE: gl.constexpr, BLOCKS: gl.constexpr,
    STEP: gl.constexpr, NARROW: gl.constexpr,
) -> gl.tuple:  # fmt: skip
    """All of x in BLOCKS blocks, asked for at once."""
    raw: gl.tuple = ()
    for block in gl.static_range(BLOCKS):
        x = _load_x(x_tile, place, block * STEP, mask, IN, RAGGED)
        raw = raw + (x,)  # noqa: RUF005
    scale = 1.0
    if norm_tile is not None:
        squares = raw[0].to(gl.float32) * raw[0].to(gl.float32)
        for block in gl.static_range(1, BLOCKS):
            wide = raw[block].to(gl.float32)
            squares += wide * wide
        scale = _norm_scale(squares, eps, IN, NARROW)
    xs: gl.tuple = ()
    for block in gl.static_range(BLOCKS):
        x = _prepared(raw[block], norm_tile, place, block * STEP, mask, scale, IN, RAGGED, TYPE)
        xs = xs + (x,)  # noqa: RUF005
    return xs


@gluon_jit
def scale_of_all(
    x_tile: gl.tensor, place: gl.tensor, mask: gl.tensor, eps: gl.tensor, IN: gl.constexpr,
    RAGGED: gl.constexpr, BLOCKS: gl.constexpr, STEP: gl.constexpr, NARROW: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """What `read_blocks` norms by, where x is not kept: `[1, 1, rows]`."""
    wide = _load_x(x_tile, place, 0, mask, IN, RAGGED).to(gl.float32)
    squares = wide * wide
    for block in range(1, BLOCKS):
        wide = _load_x(x_tile, place, block * STEP, mask, IN, RAGGED).to(gl.float32)
        squares += wide * wide
    return _norm_scale(squares, eps, IN, NARROW)
