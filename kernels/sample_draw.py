"""The token of each row, from what `sample_rows.py` has found. See `sample.py`."""

from __future__ import annotations

from kernels.dispatch import jit, tl
from kernels.sample_parts import (
    is_finite,
    lengths_of,
    most_of,
    nucleus,
    row_total,
    tile_bits,
    uniform,
)


@jit
def draw_kernel(
    logits_ptr: tl.tensor, scale_ptr: tl.tensor, min_p_ptr: tl.tensor, top_p_ptr: tl.tensor,
    top_k_ptr: tl.tensor, seeds_ptr: tl.tensor, positions_ptr: tl.tensor, best_ptr: tl.tensor,
    best_ids_ptr: tl.tensor, totals_ptr: tl.tensor, counts_ptr: tl.tensor, plan_ptr: tl.tensor,
    num_listed_ptr: tl.tensor, bits_ptr: tl.tensor, ids_ptr: tl.tensor, out_ptr: tl.tensor,
    VOCAB: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, TILES_PADDED: tl.constexpr,
    BINS: tl.constexpr, PLAN: tl.constexpr, LIST: tl.constexpr, BLOCK: tl.constexpr,
    WAYS: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.arange(0, TILES_PADDED)
    bests = tl.load(best_ptr + row * TILES + tiles, mask=tiles < TILES, other=-float("inf"))
    best = tl.max(bests, axis=0)
    tile = tl.min(tl.where(bests == best, tiles, TILES - 1), axis=0)
    is_usable = is_finite(best)
    token_id = tl.load(best_ids_ptr + row * TILES + tile)
    scale = tl.load(scale_ptr + row)
    if is_usable & (scale > 0.0):
        min_p = tl.load(min_p_ptr + row)
        top_p = tl.load(top_p_ptr + row)
        top_k = tl.load(top_k_ptr + row)
        point = uniform(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
        logits_row = logits_ptr + row * VOCAB
        totals_row = totals_ptr + row * TILES
        if (top_k > 0) | (top_p < 1.0):
            counts = tl.load(counts_ptr + row * BINS + tl.arange(0, BINS))
            num_listed = tl.load(num_listed_ptr + row)
            token_id = _draw_filtered(
                logits_row, best, scale, min_p, top_p, top_k, point,
                row_total(totals_row, TILES, TILES_PADDED), tl.sum(counts, axis=0),
                plan_ptr + row * PLAN, tl.where(num_listed > LIST, 0, num_listed),
                bits_ptr + row * LIST, ids_ptr + row * LIST, VOCAB, BLOCK, WAYS,
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
    lengths = lengths_of(tile_bits(logits_row, offsets, best, scale, min_p, VOCAB))
    passed = before + tl.cumsum(lengths, axis=0) <= target
    return tile * TILE + tl.sum(passed.to(tl.int32), axis=0)


@jit
def _draw_filtered(
    logits_row: tl.tensor, best: tl.tensor, scale: tl.tensor, min_p: tl.tensor, top_p: tl.tensor,
    top_k: tl.tensor, point: tl.tensor, total: tl.tensor, num_tokens: tl.tensor, plan: tl.tensor,
    num_listed: tl.tensor, bits_row: tl.tensor, ids_row: tl.tensor,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, WAYS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The token under `point` of the line in the order of weight, cut by the filters."""
    if top_k > 0:
        wanted = tl.minimum(top_k, num_tokens).to(tl.int64)
        bits, sum_above, num_above = _search(
            logits_row, best, scale, min_p, num_listed, bits_row, plan, wanted,
            True, VOCAB, BLOCK, WAYS,
        )  # fmt: skip
        total = sum_above + (wanted - num_above) * lengths_of(bits)
    kept = total
    if top_p < 1.0:
        wanted = nucleus(total, top_p)
        bits, sum_above, num_above = _search(
            logits_row, best, scale, min_p, num_listed, bits_row, plan + 3, wanted,
            False, VOCAB, BLOCK, WAYS,
        )  # fmt: skip
        length = lengths_of(bits)
        kept = sum_above + (wanted - sum_above + length - 1) // length * length
    target = (point * kept.to(tl.float64)).to(tl.int64)
    bits, sum_above, num_above = _search(
        logits_row, best, scale, min_p, num_listed, bits_row, plan + 6, target + 1,
        False, VOCAB, BLOCK, WAYS,
    )  # fmt: skip
    rank = (target - sum_above) // lengths_of(bits)
    return _search_id(
        logits_row, best, scale, min_p, num_listed, bits_row, ids_row, bits, rank.to(tl.int32),
        VOCAB, BLOCK, WAYS,
    )  # fmt: skip


@jit
def _search(
    logits_row: tl.tensor, best: tl.tensor, scale: tl.tensor, min_p: tl.tensor,
    num_listed: tl.tensor, bits_row: tl.tensor, stage: tl.tensor, wanted: tl.tensor,
    COUNTS: tl.constexpr, VOCAB: tl.constexpr, BLOCK: tl.constexpr, WAYS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """The largest bits such that weights of at least these make up `wanted` (COUNTS: are so
    many); the sum and the number of the heavier ones. In the list: those of the stage's bins,
    behind what lies before them."""
    way = tl.arange(0, WAYS)
    low = tl.full([], 86 << 23, tl.int32)  # does: lighter ones have no length
    high = tl.full([], (127 << 23) + 1, tl.int32)  # does not: nothing is heavier than 1
    sum_high = tl.full([], 0, tl.int64)
    num_high = tl.full([], 0, tl.int64)
    num_items = tl.full([], VOCAB, tl.int32)
    if num_listed > 0:
        low = most_of(tl.load(stage + 1).to(tl.int32) + 1) + 1
        high = most_of(tl.load(stage).to(tl.int32)) + 1
        sum_high = tl.load(stage + 2)
        if COUNTS:
            num_high = tl.load(stage + 9)
        num_items = num_listed
    heaviest = high
    sum_before, num_before = sum_high, num_high
    while high - low > 1:
        step = (high - low + WAYS) // (WAYS + 1)
        thresholds = low + (way + 1) * step
        sums = tl.zeros([WAYS], tl.int64) + sum_before
        counts = tl.zeros([WAYS], tl.int64) + num_before
        for begin in range(0, num_items, BLOCK):
            offsets = begin + tl.arange(0, BLOCK)
            if num_listed > 0:
                bits = tl.load(bits_row + offsets, mask=offsets < num_listed, other=0)
            else:
                bits = tile_bits(logits_row, offsets, best, scale, min_p, VOCAB)
            reaches = (bits[:, None] >= thresholds[None, :]) & (bits < heaviest)[:, None]
            sums += tl.sum(tl.where(reaches, lengths_of(bits)[:, None], 0), axis=0)
            counts += tl.sum(reaches.to(tl.int32), axis=0).to(tl.int64)
        does = ((counts if COUNTS else sums) >= wanted) & (thresholds < high)
        num_true = tl.sum(does.to(tl.int32), axis=0)
        if low + (num_true + 1) * step < high:
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
    while high - low > 1:
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
                bits = tile_bits(logits_row, offsets, best, scale, min_p, VOCAB)
                ids = offsets
            is_before = (ids[:, None] < thresholds[None, :]) & (bits == wanted_bits)[:, None]
            counts += tl.sum(is_before.to(tl.int32), axis=0)
        num_true = tl.sum((counts <= rank).to(tl.int32), axis=0)
        high = tl.minimum(high, low + (num_true + 1) * step)
        low = low + num_true * step
    return low
