"""One token for each row of logits, without the host, the same in every batch and on every device.

What is computed is `draw.py`'s line of tokens; here is how, on a GPU. A row is cut into tiles.

1. `_best_kernel`: each tile's best logit and its first id; infinite where one is not a number.
2. `_weigh_kernel` (rows with a temperature): each tile's sum of integer weights; for filtered rows
   also how many weights lie in each octave below the best, over the whole row.
3. `_collect_kernel` (filtered rows): the octaves tell how deep top-k or top-p can reach, so only
   tokens that heavy are copied to a list. A list that would be too long is left empty.
4. `_draw_kernel`: the best token, or the tile and then the token under the row's random point. In
   a filtered row the thresholds of top-k and top-p, then the weight under the point, are searched
   by bisection over the bits of the weight, nine parts at a time, in the list or, without one, in
   the whole row; of equal weights the id decides. Sums of integers are exact in any order, so the
   order in which tiles come is nowhere to be seen.

All grids follow from shapes and nothing is read back, so the whole is captured in a graph.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from kernels.dispatch import jit, next_power_of_two, runs_triton, tl
from kernels.draw import draw_any, draw_filtered, token_weights
from kernels.randomness import uniforms

NO_TOKEN = -1
MAX_CANDIDATES = 1024  # on the CPU a filtered draw looks at more tokens only if these do not do
_TILE = 2048
_NUM_OCTAVES = 64  # 0 holds the weight 1, n holds [2**-n, 2**(1 - n)); from 41 on: no length
_LIST_SIZE = 8192
_MAX_ELEMENTS = 1 << 24  # CPU: logits drawn from at once, bounds the workspace to about 0.5 GB


class DrawParams(NamedTuple):
    """How each of n rows is drawn: tensors [n] beside the logits. Rows are independent."""

    scale: torch.Tensor  # float32, log2(e) / temperature; 0: take the best token
    min_p: torch.Tensor  # float32
    top_p: torch.Tensor  # float64, 1: off
    top_k: torch.Tensor  # int32, 0: off
    seeds: torch.Tensor  # int64, not negative
    positions: torch.Tensor  # int64, the index that the new token takes


class SampleWorkspace:
    """Scratch memory of the kernels for up to `max_rows` rows; one launch at a time uses it."""

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device) -> None:
        num_tiles = -(-vocab_size // _TILE)

        def empty(width: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(max_rows, width, dtype=dtype, device=device)

        self.best = empty(num_tiles, torch.float32)
        self.best_ids = empty(num_tiles, torch.int32)
        self.totals = empty(num_tiles, torch.int64)
        self.octaves = empty(_NUM_OCTAVES, torch.int32)
        self.num_listed = empty(1, torch.int32)
        self.listed_bits = empty(_LIST_SIZE, torch.int32)
        self.listed_ids = empty(_LIST_SIZE, torch.int32)


def sample(
    logits: torch.Tensor,
    params: DrawParams,
    *,
    out: torch.Tensor,
    workspace: SampleWorkspace | None = None,
) -> torch.Tensor:
    """Token ids into `out` int64 [n]: of row i of `logits` [n, vocab], any float type, contiguous.

    A row whose best logit is no finite number gets `NO_TOKEN`. On a GPU `workspace` of at least n
    rows is needed. Returns `out`.
    """
    if runs_triton(logits):
        assert workspace is not None
        _sample_triton(logits, params, out, workspace)
    else:
        _sample_reference(logits.float(), params, out)
    return out


def best_tokens(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row maxima of float32 CPU logits and their first ids; a row with a NaN has NaN."""
    # Ten times faster than torch, which does not vectorise this on a CPU.
    array = logits.numpy()
    ids = array.argmax(axis=-1)
    return torch.from_numpy(array[np.arange(len(ids)), ids]), torch.from_numpy(ids)


def _sample_reference(logits: torch.Tensor, params: DrawParams, out: torch.Tensor) -> None:
    best, token_ids = best_tokens(logits)
    out.copy_(token_ids)
    drawn = params.scale.nonzero().flatten()
    if len(drawn):
        is_filtered = (params.top_k[drawn] > 0) | (params.top_p[drawn] < 1.0)
        for rows, filters in ((drawn[~is_filtered], False), (drawn[is_filtered], True)):
            for part in torch.split(rows, max(1, _MAX_ELEMENTS // logits.shape[-1])):
                if len(part):
                    out[part] = _draw_rows(logits, best, params, part, filters)
    out.masked_fill_(~best.isfinite(), NO_TOKEN)


def _draw_rows(
    logits: torch.Tensor, best: torch.Tensor, params: DrawParams, rows: torch.Tensor, filters: bool
) -> torch.Tensor:
    """Token ids of these rows, all filtered or none."""
    scale, min_p, top_p, top_k, seeds, positions = (each[rows].unsqueeze(1) for each in params)
    points = uniforms(seeds.numpy().view(np.uint64), positions.numpy().view(np.uint64))
    point = torch.from_numpy(points)
    of_rows = logits if len(rows) == len(logits) else logits[rows]
    thresholds = min_p if float(min_p.max()) > 0.0 else None
    weights = token_weights(of_rows, best[rows].unsqueeze(1), scale, thresholds)
    if not filters:
        return draw_any(weights, point)
    most = int(top_k.max()) if int(top_k.min()) > 0 else MAX_CANDIDATES
    top_k = top_k.long()
    token_ids, is_enough = draw_filtered(weights, point, top_k, top_p, min(MAX_CANDIDATES, most))
    lacking = (~is_enough).nonzero().flatten()
    if len(lacking):
        token_ids[lacking], _ = draw_filtered(
            weights[lacking], point[lacking], top_k[lacking], top_p[lacking], weights.shape[-1]
        )
    return token_ids


# ---- Triton --------------------------------------------------------------------------------


def _sample_triton(
    logits: torch.Tensor, params: DrawParams, out: torch.Tensor, work: SampleWorkspace
) -> None:
    num_rows, vocab_size = logits.shape
    assert logits.is_contiguous()
    num_tiles = work.best.shape[1]
    assert num_rows <= len(work.best)
    assert num_tiles == -(-vocab_size // _TILE)
    if num_rows == 0:
        return
    grid = (num_rows, num_tiles)
    sizes = {
        "VOCAB": vocab_size,
        "TILE": _TILE,
        "TILES": num_tiles,
        "TILES_PADDED": next_power_of_two(num_tiles),
        "OCTAVES": _NUM_OCTAVES,
        # A fused product and sum would round once where the reference rounds twice.
        "enable_fp_fusion": False,
    }
    scale, min_p, top_p, top_k, seeds, positions = params
    _best_kernel[grid](
        logits, work.best, work.best_ids, work.octaves, work.num_listed, **sizes, num_warps=4
    )
    _weigh_kernel[grid](
        logits, scale, min_p, top_p, top_k, work.best, work.totals, work.octaves,
        **sizes, num_warps=4,
    )  # fmt: skip
    _collect_kernel[grid](
        logits, scale, min_p, top_p, top_k, work.best, work.totals, work.octaves, work.num_listed,
        work.listed_bits, work.listed_ids, **sizes, LIST=_LIST_SIZE, num_warps=4,
    )  # fmt: skip
    _draw_kernel[(num_rows,)](
        logits, scale, min_p, top_p, top_k, seeds, positions, work.best, work.best_ids,
        work.totals, work.octaves, work.num_listed, work.listed_bits, work.listed_ids, out,
        **sizes, LIST=_LIST_SIZE, BLOCK=1024, WAYS=8, num_warps=8,
    )  # fmt: skip


@jit
def _weights(
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
def _lengths(bits: tl.tensor) -> tl.tensor:
    """Integer lengths of weights given by their bits."""
    return (bits.to(tl.float32, bitcast=True) * 1099511627776.0).to(tl.int64)


@jit
def _tile_bits(
    logits_row: tl.tensor, offsets: tl.tensor, best: tl.tensor, scale: tl.tensor, min_p: tl.tensor,
    VOCAB: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Bits of the weights of these tokens; beyond the vocabulary of ones without length."""
    x = tl.load(logits_row + offsets, mask=offsets < VOCAB, other=-float("inf")).to(tl.float32)
    return _weights(x, best, scale, min_p).to(tl.int32, bitcast=True)


@jit
def _row_best(
    best_row: tl.tensor, TILES: tl.constexpr, TILES_PADDED: tl.constexpr
) -> tl.tensor:  # fmt: skip
    tiles = tl.arange(0, TILES_PADDED)
    return tl.max(tl.load(best_row + tiles, mask=tiles < TILES, other=-float("inf")), axis=0)


@jit
def _row_total(
    totals_row: tl.tensor, TILES: tl.constexpr, TILES_PADDED: tl.constexpr
) -> tl.tensor:  # fmt: skip
    tiles = tl.arange(0, TILES_PADDED)
    return tl.sum(tl.load(totals_row + tiles, mask=tiles < TILES, other=0), axis=0)


@jit
def _is_finite(best: tl.tensor) -> tl.tensor:
    return (best > -float("inf")) & (best < float("inf"))


@jit
def _nucleus(total: tl.tensor, top_p: tl.tensor) -> tl.tensor:
    """How much of `total` the nucleus must make up, at least 1."""
    wanted = tl.maximum(tl.ceil(total.to(tl.float64) * top_p).to(tl.int64), 1)
    return tl.where(top_p < 1.0, tl.minimum(wanted, total), total)


@jit
def _best_kernel(
    logits_ptr: tl.tensor, best_ptr: tl.tensor, ids_ptr: tl.tensor, octaves_ptr: tl.tensor,
    num_listed_ptr: tl.tensor, VOCAB: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
    TILES_PADDED: tl.constexpr, OCTAVES: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    offsets = tile * TILE + tl.arange(0, TILE)
    mask = offsets < VOCAB
    x = tl.load(logits_ptr + row * VOCAB + offsets, mask=mask, other=-float("inf")).to(tl.float32)
    best = tl.max(x, axis=0)
    first = tl.min(tl.where((x == best) & mask, offsets, VOCAB - 1), axis=0)
    has_nan = tl.max((x != x).to(tl.int32), axis=0) > 0
    tl.store(best_ptr + row * TILES + tile, tl.where(has_nan, float("inf"), best))
    tl.store(ids_ptr + row * TILES + tile, first)
    if tile == 0:
        octave = tl.arange(0, OCTAVES)
        tl.store(octaves_ptr + row * OCTAVES + octave, tl.zeros([OCTAVES], tl.int32))
        tl.store(num_listed_ptr + row, 0)


@jit
def _weigh_kernel(
    logits_ptr: tl.tensor, scale_ptr: tl.tensor, min_p_ptr: tl.tensor, top_p_ptr: tl.tensor,
    top_k_ptr: tl.tensor, best_ptr: tl.tensor, totals_ptr: tl.tensor, octaves_ptr: tl.tensor,
    VOCAB: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, TILES_PADDED: tl.constexpr,
    OCTAVES: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    scale = tl.load(scale_ptr + row)
    best = _row_best(best_ptr + row * TILES, TILES, TILES_PADDED)
    if (scale > 0.0) & _is_finite(best):
        offsets = tile * TILE + tl.arange(0, TILE)
        min_p = tl.load(min_p_ptr + row)
        bits = _tile_bits(logits_ptr + row * VOCAB, offsets, best, scale, min_p, VOCAB)
        lengths = _lengths(bits)
        tl.store(totals_ptr + row * TILES + tile, tl.sum(lengths, axis=0))
        if (tl.load(top_k_ptr + row) > 0) | (tl.load(top_p_ptr + row) < 1.0):
            octave = tl.where(lengths > 0, 127 - (bits >> 23), OCTAVES - 1)
            counts = tl.histogram(octave, OCTAVES)
            column = tl.arange(0, OCTAVES)
            counted = (counts > 0) & (column < OCTAVES - 1)
            tl.atomic_add(octaves_ptr + row * OCTAVES + column, counts, mask=counted)


@jit
def _depth(
    counts: tl.tensor, total: tl.tensor, top_k: tl.tensor, top_p: tl.tensor, OCTAVES: tl.constexpr
) -> tl.tensor:  # fmt: skip
    """The octave down to which the filters can reach; deeper tokens are surely cut off."""
    octave = tl.arange(0, OCTAVES)
    if top_k > 0:
        wanted = tl.minimum(top_k, tl.sum(counts, axis=0))
        reaches = tl.cumsum(counts, axis=0) >= wanted
    else:
        # At most so much is lost with all octaves deeper than each.
        most = counts.to(tl.int64) << tl.maximum(41 - octave, 0).to(tl.int64)
        lost = tl.sum(most, axis=0) - tl.cumsum(most, axis=0)
        reaches = lost <= total - _nucleus(total, top_p)
    return tl.min(tl.where(reaches, octave, OCTAVES - 1), axis=0)


@jit
def _collect_kernel(
    logits_ptr: tl.tensor, scale_ptr: tl.tensor, min_p_ptr: tl.tensor, top_p_ptr: tl.tensor,
    top_k_ptr: tl.tensor, best_ptr: tl.tensor, totals_ptr: tl.tensor, octaves_ptr: tl.tensor,
    num_listed_ptr: tl.tensor, bits_ptr: tl.tensor, ids_ptr: tl.tensor,
    VOCAB: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, TILES_PADDED: tl.constexpr,
    OCTAVES: tl.constexpr, LIST: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    scale = tl.load(scale_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    best = _row_best(best_ptr + row * TILES, TILES, TILES_PADDED)
    if (scale > 0.0) & _is_finite(best) & ((top_k > 0) | (top_p < 1.0)):
        octave = tl.arange(0, OCTAVES)
        counts = tl.load(octaves_ptr + row * OCTAVES + octave)
        total = _row_total(totals_ptr + row * TILES, TILES, TILES_PADDED)
        depth = _depth(counts, total, top_k, top_p, OCTAVES)
        lightest = (127 - tl.minimum(depth, 41)) << 23
        num_kept = tl.sum(tl.where(octave <= depth, counts, 0), axis=0)
        min_p = tl.load(min_p_ptr + row)
        # Of the tile, nearly: weights need not grow with logits in the very last bit.
        heaviest = _weights(tl.load(best_ptr + row * TILES + tile), best, scale, min_p)
        heaviest = heaviest.to(tl.int32, bitcast=True)
        if (num_kept <= LIST) & (heaviest + 16 >= lightest):
            offsets = tile * TILE + tl.arange(0, TILE)
            bits = _tile_bits(logits_ptr + row * VOCAB, offsets, best, scale, min_p, VOCAB)
            is_kept = (bits >= lightest) & (_lengths(bits) > 0)
            kept = is_kept.to(tl.int32)
            first = tl.atomic_add(num_listed_ptr + row, tl.sum(kept, axis=0))
            place = row * LIST + first + tl.cumsum(kept, axis=0) - 1
            tl.store(bits_ptr + place, bits, mask=is_kept)
            tl.store(ids_ptr + place, offsets, mask=is_kept)


@jit
def _mix(bits: tl.tensor) -> tl.tensor:
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    return bits ^ (bits >> 31)


@jit
def _uniform(seed: tl.tensor, position: tl.tensor) -> tl.tensor:
    """As `randomness.uniforms`."""
    steps = (position + 1).to(tl.uint64)
    state = _mix(seed.to(tl.uint64)) + steps * 0x9E3779B97F4A7C15
    return (_mix(state) >> 11).to(tl.int64).to(tl.float64) * 1.1102230246251565e-16


@jit
def _draw_kernel(
    logits_ptr: tl.tensor, scale_ptr: tl.tensor, min_p_ptr: tl.tensor, top_p_ptr: tl.tensor,
    top_k_ptr: tl.tensor, seeds_ptr: tl.tensor, positions_ptr: tl.tensor, best_ptr: tl.tensor,
    best_ids_ptr: tl.tensor, totals_ptr: tl.tensor, octaves_ptr: tl.tensor,
    num_listed_ptr: tl.tensor, bits_ptr: tl.tensor, ids_ptr: tl.tensor, out_ptr: tl.tensor,
    VOCAB: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, TILES_PADDED: tl.constexpr,
    OCTAVES: tl.constexpr, LIST: tl.constexpr, BLOCK: tl.constexpr, WAYS: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.arange(0, TILES_PADDED)
    bests = tl.load(best_ptr + row * TILES + tiles, mask=tiles < TILES, other=-float("inf"))
    best = tl.max(bests, axis=0)
    tile = tl.min(tl.where(bests == best, tiles, TILES - 1), axis=0)
    is_usable = _is_finite(best)
    token_id = tl.load(best_ids_ptr + row * TILES + tile)
    scale = tl.load(scale_ptr + row)
    if is_usable & (scale > 0.0):
        min_p = tl.load(min_p_ptr + row)
        top_p = tl.load(top_p_ptr + row)
        top_k = tl.load(top_k_ptr + row)
        point = _uniform(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
        logits_row = logits_ptr + row * VOCAB
        totals_row = totals_ptr + row * TILES
        if (top_k > 0) | (top_p < 1.0):
            counts = tl.load(octaves_ptr + row * OCTAVES + tl.arange(0, OCTAVES))
            token_id = _draw_listed(
                logits_row, best, scale, min_p, top_p, top_k, point,
                _row_total(totals_row, TILES, TILES_PADDED), tl.sum(counts, axis=0),
                tl.load(num_listed_ptr + row), bits_ptr + row * LIST, ids_ptr + row * LIST,
                VOCAB, BLOCK, WAYS,
            )  # fmt: skip
        else:
            token_id = _draw_any(
                logits_row, best, scale, min_p, point, totals_row, VOCAB, TILE, TILES, TILES_PADDED
            )
    tl.store(out_ptr + row, tl.where(is_usable, token_id, -1).to(tl.int64))


@jit
def _draw_any(
    logits_row: tl.tensor, best: tl.tensor, scale: tl.tensor, min_p: tl.tensor, point: tl.tensor,
    totals_row: tl.tensor, VOCAB: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
    TILES_PADDED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The token under `point` of the line in the order of ids: first its tile."""
    tiles = tl.arange(0, TILES_PADDED)
    totals = tl.load(totals_row + tiles, mask=tiles < TILES, other=0)
    target = (point * tl.sum(totals, axis=0).to(tl.float64)).to(tl.int64)
    tile = tl.sum((tl.cumsum(totals, axis=0) <= target).to(tl.int32), axis=0)
    before = tl.sum(tl.where(tiles < tile, totals, 0), axis=0)
    offsets = tile * TILE + tl.arange(0, TILE)
    lengths = _lengths(_tile_bits(logits_row, offsets, best, scale, min_p, VOCAB))
    passed = before + tl.cumsum(lengths, axis=0) <= target
    return tile * TILE + tl.sum(passed.to(tl.int32), axis=0)


@jit
def _draw_listed(
    logits_row: tl.tensor, best: tl.tensor, scale: tl.tensor, min_p: tl.tensor, top_p: tl.tensor,
    top_k: tl.tensor, point: tl.tensor, total: tl.tensor, num_tokens: tl.tensor,
    num_listed: tl.tensor, bits_row: tl.tensor, ids_row: tl.tensor,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, WAYS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The token under `point` of the line in the order of weight, cut by the filters."""
    if top_k > 0:
        wanted = tl.minimum(top_k, num_tokens).to(tl.int64)
        bits, sum_above, num_above = _search(
            logits_row, best, scale, min_p, num_listed, bits_row, wanted, True, VOCAB, BLOCK, WAYS
        )
        total = sum_above + (wanted - num_above) * _lengths(bits)
    kept = total
    if top_p < 1.0:
        wanted = _nucleus(total, top_p)
        bits, sum_above, num_above = _search(
            logits_row, best, scale, min_p, num_listed, bits_row, wanted, False, VOCAB, BLOCK, WAYS
        )
        length = _lengths(bits)
        kept = sum_above + (wanted - sum_above + length - 1) // length * length
    target = (point * kept.to(tl.float64)).to(tl.int64)
    bits, sum_above, num_above = _search(
        logits_row, best, scale, min_p, num_listed, bits_row, target + 1, False, VOCAB, BLOCK, WAYS
    )
    rank = (target - sum_above) // _lengths(bits)
    return _search_id(
        logits_row, best, scale, min_p, num_listed, bits_row, ids_row, bits, rank.to(tl.int32),
        VOCAB, BLOCK, WAYS,
    )  # fmt: skip


@jit
def _search(
    logits_row: tl.tensor, best: tl.tensor, scale: tl.tensor, min_p: tl.tensor,
    num_listed: tl.tensor, bits_row: tl.tensor, wanted: tl.tensor, COUNTS: tl.constexpr,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, WAYS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """The largest bits such that weights of at least these make up `wanted` (COUNTS: are so
    many); the sum and the number of the heavier ones."""
    way = tl.arange(0, WAYS)
    low = tl.full([], 86 << 23, tl.int32)  # does: lighter ones have no length
    high = tl.full([], (127 << 23) + 1, tl.int32)  # does not: nothing is heavier than 1
    sum_high = tl.full([], 0, tl.int64)
    num_high = tl.full([], 0, tl.int64)
    num_items = tl.where(num_listed > 0, num_listed, VOCAB)
    for _ in range(9):  # nine parts each: 9**9 > high - low
        step = (high - low + WAYS) // (WAYS + 1)
        thresholds = low + (way + 1) * step
        sums = tl.zeros([WAYS], tl.int64)
        counts = tl.zeros([WAYS], tl.int64)
        for begin in range(0, num_items, BLOCK):
            offsets = begin + tl.arange(0, BLOCK)
            if num_listed > 0:
                bits = tl.load(bits_row + offsets, mask=offsets < num_listed, other=0)
            else:
                bits = _tile_bits(logits_row, offsets, best, scale, min_p, VOCAB)
            reaches = bits[:, None] >= thresholds[None, :]
            sums += tl.sum(tl.where(reaches, _lengths(bits)[:, None], 0), axis=0)
            counts += tl.sum(reaches.to(tl.int32), axis=0).to(tl.int64)
        does = (counts if COUNTS else sums) >= wanted
        num_true = tl.sum(does.to(tl.int32), axis=0)
        if num_true < WAYS:
            sum_high = tl.sum(tl.where(way == num_true, sums, 0), axis=0)
            num_high = tl.sum(tl.where(way == num_true, counts, 0), axis=0)
            high = low + (num_true + 1) * step
        low = low + num_true * step
    return low, sum_high, num_high


@jit
def _search_id(
    logits_row: tl.tensor, best: tl.tensor, scale: tl.tensor, min_p: tl.tensor,
    num_listed: tl.tensor, bits_row: tl.tensor, ids_row: tl.tensor, wanted_bits: tl.tensor,
    rank: tl.tensor, VOCAB: tl.constexpr, BLOCK: tl.constexpr, WAYS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The id number `rank` of the tokens whose weight has exactly these bits."""
    way = tl.arange(0, WAYS)
    low = tl.full([], 0, tl.int32)  # at most `rank` of them have an id below this,
    high = tl.full([], VOCAB, tl.int32)  # more have one below this
    num_items = tl.where(num_listed > 0, num_listed, VOCAB)
    for _ in range(6):  # nine parts each: 9**6 > VOCAB
        step = (high - low + WAYS) // (WAYS + 1)
        thresholds = low + (way + 1) * step
        counts = tl.zeros([WAYS], tl.int32)
        for begin in range(0, num_items, BLOCK):
            offsets = begin + tl.arange(0, BLOCK)
            if num_listed > 0:
                is_listed = offsets < num_listed
                bits = tl.load(bits_row + offsets, mask=is_listed, other=0)
                ids = tl.load(ids_row + offsets, mask=is_listed, other=VOCAB)
            else:
                bits = _tile_bits(logits_row, offsets, best, scale, min_p, VOCAB)
                ids = offsets
            is_before = (ids[:, None] < thresholds[None, :]) & (bits == wanted_bits)[:, None]
            counts += tl.sum(is_before.to(tl.int32), axis=0)
        num_true = tl.sum((counts <= rank).to(tl.int32), axis=0)
        high = tl.minimum(high, low + (num_true + 1) * step)
        low = low + num_true * step
    return low
