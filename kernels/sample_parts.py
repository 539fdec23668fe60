"""Parts of the kernels that draw tokens: weights as integers, sums of a row, random points."""

from __future__ import annotations

from kernels.dispatch import jit, tl
from kernels.splitmix import finalized


@jit
def weights_of(
    logits: tl.tensor, best: tl.tensor, scale: tl.tensor, min_p: tl.tensor
) -> tl.tensor:  # fmt: skip
    """As `draw.token_weights`, operation by operation."""
    exponent = tl.maximum((logits - best) * scale, -126.0)
    whole = tl.floor(exponent)
    part = exponent - whole
    weights = part * 0.0018671300495043397
    weights = (weights + 0.009017030708491802) * part
    weights = (weights + 0.05579991266131401) * part
    weights = (weights + 0.24016444385051727) * part
    weights = (weights + 0.6931512951850891) * part
    weights = weights + 1.0
    weights = weights * ((whole.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(weights < min_p, 0.0, weights)


@jit
def lengths_of(bits: tl.tensor) -> tl.tensor:
    """Integer lengths of weights given by their bits."""
    return (bits.to(tl.float32, bitcast=True) * 1099511627776.0).to(tl.int64)


@jit
def tile_bits(
    logits_row: tl.tensor, offsets: tl.tensor, best: tl.tensor, scale: tl.tensor, min_p: tl.tensor,
    VOCAB: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Bits of the weights of these tokens; beyond the vocabulary of ones without length."""
    x = tl.load(logits_row + offsets, mask=offsets < VOCAB, other=-float("inf")).to(tl.float32)
    return weights_of(x, best, scale, min_p).to(tl.int32, bitcast=True)


@jit
def row_best(
    best_row: tl.tensor, TILES: tl.constexpr, TILES_PADDED: tl.constexpr
) -> tl.tensor:  # fmt: skip
    tiles = tl.arange(0, TILES_PADDED)
    return tl.max(tl.load(best_row + tiles, mask=tiles < TILES, other=-float("inf")), axis=0)


@jit
def row_total(
    totals_row: tl.tensor, TILES: tl.constexpr, TILES_PADDED: tl.constexpr
) -> tl.tensor:  # fmt: skip
    tiles = tl.arange(0, TILES_PADDED)
    return tl.sum(tl.load(totals_row + tiles, mask=tiles < TILES, other=0), axis=0)


@jit
def is_finite(best: tl.tensor) -> tl.tensor:
    return (best > -float("inf")) & (best < float("inf"))


@jit
def nucleus(total: tl.tensor, top_p: tl.tensor) -> tl.tensor:
    """How much of `total` the nucleus must make up, at least 1."""
    wanted = tl.maximum(tl.ceil(total.to(tl.float64) * top_p).to(tl.int64), 1)
    return tl.where(top_p < 1.0, tl.minimum(wanted, total), total)


@jit
def is_filtered(scale: tl.tensor, top_p: tl.tensor, top_k: tl.tensor) -> tl.tensor:
    return (scale > 0.0) & ((top_k > 0) | (top_p < 1.0))


@jit
def bin_of(bits: tl.tensor) -> tl.tensor:
    return ((127 << 23) - bits) >> 19


@jit
def most_of(column: tl.tensor) -> tl.tensor:
    """Bits of the heaviest weight that a bin can hold."""
    return (127 << 23) - (column << 19)


@jit
def uniform(seed: tl.tensor, position: tl.tensor) -> tl.tensor:
    """As `randomness.uniforms`."""
    steps = (position + 1).to(tl.uint64)
    state = finalized(seed.to(tl.uint64)) + steps * 0x9E3779B97F4A7C15
    return (finalized(state) >> 11).to(tl.int64).to(tl.float64) * 1.1102230246251565e-16
