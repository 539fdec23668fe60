"""What is found of all tokens of a row before one is drawn: its best, sums, and which tokens lie
where the filters cut and the point falls. See `sample.py`."""

from __future__ import annotations

from kernels.dispatch import jit, tl
from kernels.sample_parts import (
    bin_of,
    is_filtered,
    is_finite,
    lengths_of,
    most_of,
    nucleus,
    row_best,
    row_total,
    tile_bits,
    uniform,
    weights_of,
)


@jit
def best_kernel(
    logits_ptr: tl.tensor, scale_ptr: tl.tensor, min_p_ptr: tl.tensor, top_p_ptr: tl.tensor,
    top_k_ptr: tl.tensor, best_ptr: tl.tensor, ids_ptr: tl.tensor, sums_ptr: tl.tensor,
    counts_ptr: tl.tensor, num_listed_ptr: tl.tensor, VOCAB: tl.constexpr, TILE: tl.constexpr,
    TILES: tl.constexpr, TILES_PADDED: tl.constexpr, BINS: tl.constexpr,
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
        tl.store(num_listed_ptr + row, 0)
        scale = tl.load(scale_ptr + row)
        if is_filtered(scale, tl.load(top_p_ptr + row), tl.load(top_k_ptr + row)):
            column = tl.arange(0, BINS)
            tl.store(sums_ptr + row * BINS + column, tl.zeros([BINS], tl.int64))
            tl.store(counts_ptr + row * BINS + column, tl.zeros([BINS], tl.int32))


@jit
def weigh_kernel(
    logits_ptr: tl.tensor, scale_ptr: tl.tensor, min_p_ptr: tl.tensor, top_p_ptr: tl.tensor,
    top_k_ptr: tl.tensor, best_ptr: tl.tensor, totals_ptr: tl.tensor, sums_ptr: tl.tensor,
    counts_ptr: tl.tensor, VOCAB: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
    TILES_PADDED: tl.constexpr, BINS: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    scale = tl.load(scale_ptr + row)
    if scale > 0.0:
        best = row_best(best_ptr + row * TILES, TILES, TILES_PADDED)
        if is_finite(best):
            offsets = tile * TILE + tl.arange(0, TILE)
            min_p = tl.load(min_p_ptr + row)
            bits = tile_bits(logits_ptr + row * VOCAB, offsets, best, scale, min_p, VOCAB)
            lengths = lengths_of(bits)
            tl.store(totals_ptr + row * TILES + tile, tl.sum(lengths, axis=0))
            top_k = tl.load(top_k_ptr + row)
            top_p = tl.load(top_p_ptr + row)
            place = bin_of(bits)
            sums_row, counts_row = sums_ptr + row * BINS, counts_ptr + row * BINS
            if top_k > 0:
                least = _lightest_of_tiles(
                    best_ptr + row * TILES, best, scale, top_k, TILES, TILES_PADDED
                )
                counts = (lengths > 0) & (bits >= least)
                tl.atomic_add(sums_row + place, lengths, mask=counts, sem="relaxed")
                ones = tl.full([TILE], 1, tl.int32)
                tl.atomic_add(counts_row + place, ones, mask=counts, sem="relaxed")
            elif top_p < 1.0:
                # All tokens lighter than this together are less than the nucleus leaves out.
                spare = ((1.0 - top_p) * (0.5 * 1099511627776.0 / VOCAB)).to(tl.int64)
                counts = (lengths > 0) & (lengths >= spare)
                tl.atomic_add(sums_row + place, lengths, mask=counts, sem="relaxed")


@jit
def _lightest_of_tiles(
    best_row: tl.tensor, best: tl.tensor, scale: tl.tensor, top_k: tl.tensor, TILES: tl.constexpr,
    TILES_PADDED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Bits of a weight that at least `top_k` tokens have: of the best token of the tile that is
    number `top_k` by its best. 0 where there are fewer tiles."""
    tiles = tl.arange(0, TILES_PADDED)
    bests = tl.load(best_row + tiles, mask=tiles < TILES, other=-float("inf"))
    heavier = (bests[None, :] > bests[:, None]) | (
        (bests[None, :] == bests[:, None]) & (tiles[None, :] < tiles[:, None])
    )
    rank = tl.sum(heavier.to(tl.int32), axis=1)
    chosen = tl.max(tl.where(rank == top_k - 1, bests, -float("inf")), axis=0)
    bits = weights_of(chosen, best, scale, 0.0).to(tl.int32, bitcast=True)
    # Less the last bits, in which weights need not grow with logits.
    return tl.where(top_k <= TILES, bits - 16, 0)


@jit
def _first(holds: tl.tensor, column: tl.tensor, BINS: tl.constexpr) -> tl.tensor:
    return tl.min(tl.where(holds, column, BINS - 1), axis=0)


@jit
def plan_kernel(
    scale_ptr: tl.tensor, min_p_ptr: tl.tensor, top_p_ptr: tl.tensor, top_k_ptr: tl.tensor,
    seeds_ptr: tl.tensor, positions_ptr: tl.tensor, best_ptr: tl.tensor, totals_ptr: tl.tensor,
    sums_ptr: tl.tensor, counts_ptr: tl.tensor, plan_ptr: tl.tensor, VOCAB: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr, TILES_PADDED: tl.constexpr, BINS: tl.constexpr,
    PLAN: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    if is_filtered(tl.load(scale_ptr + row), top_p, top_k):
        plan = plan_ptr + row * PLAN
        column = tl.arange(0, BINS)
        sums = tl.load(sums_ptr + row * BINS + column)
        ends = tl.cumsum(sums, axis=0)
        least = row_total(totals_ptr + row * TILES, TILES, TILES_PADDED)
        all_most = least
        limit = tl.full([], BINS - 1, tl.int32)  # nothing deeper is drawn
        if top_k > 0:
            counts = tl.load(counts_ptr + row * BINS + column).to(tl.int64)
            num_ends = tl.cumsum(counts, axis=0)
            wanted = tl.minimum(top_k, tl.max(num_ends, axis=0))
            at = _first(num_ends >= wanted, column, BINS)
            before = tl.sum(tl.where(column < at, sums, 0), axis=0)
            num_before = tl.sum(tl.where(column < at, counts, 0), axis=0)
            least = before + (wanted - num_before) * lengths_of(most_of(at + 1) + 1)
            all_most = before + (wanted - num_before) * lengths_of(most_of(at))
            _store_stage(plan, at, at, before)
            tl.store(plan + 9, num_before)
            limit = at
        least = nucleus(least, top_p)
        most = nucleus(all_most, top_p)
        if top_p < 1.0:
            at = _first(ends >= least, column, BINS)
            limit = tl.minimum(_first(ends >= most, column, BINS), limit)
            before = tl.sum(tl.where(column < at, sums, 0), axis=0)
            _store_stage(plan + 3, at, limit, before)
            most = tl.minimum(most + lengths_of(most_of(at)), all_most)
        point = uniform(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
        at = _first(ends > (point * least.to(tl.float64)).to(tl.int64), column, BINS)
        last = _first(ends > (point * most.to(tl.float64)).to(tl.int64), column, BINS)
        before = tl.sum(tl.where(column < at, sums, 0), axis=0)
        _store_stage(plan + 6, at, tl.minimum(last, limit), before)


@jit
def _store_stage(plan: tl.tensor, first: tl.tensor, last: tl.tensor, before: tl.tensor) -> None:
    tl.store(plan, first.to(tl.int64))
    tl.store(plan + 1, last.to(tl.int64))
    tl.store(plan + 2, before)


@jit
def collect_kernel(
    logits_ptr: tl.tensor, scale_ptr: tl.tensor, min_p_ptr: tl.tensor, top_p_ptr: tl.tensor,
    top_k_ptr: tl.tensor, best_ptr: tl.tensor, plan_ptr: tl.tensor, num_listed_ptr: tl.tensor,
    bits_ptr: tl.tensor, ids_ptr: tl.tensor, VOCAB: tl.constexpr, TILE: tl.constexpr,
    TILES: tl.constexpr, TILES_PADDED: tl.constexpr, BINS: tl.constexpr, PLAN: tl.constexpr,
    LIST: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    scale = tl.load(scale_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    if is_filtered(scale, top_p, top_k):
        best = row_best(best_ptr + row * TILES, TILES, TILES_PADDED)
        if is_finite(best):
            min_p = tl.load(min_p_ptr + row)
            plan = plan_ptr + row * PLAN
            from_t, to_t = tl.load(plan + 6).to(tl.int32), tl.load(plan + 7).to(tl.int32)
            from_k, to_k = from_t, to_t
            from_p, to_p = from_t, to_t
            if top_k > 0:
                from_k, to_k = tl.load(plan).to(tl.int32), tl.load(plan + 1).to(tl.int32)
            if top_p < 1.0:
                from_p, to_p = tl.load(plan + 3).to(tl.int32), tl.load(plan + 4).to(tl.int32)
            deepest = tl.maximum(tl.maximum(to_k, to_p), to_t)
            # Of the tile, nearly: weights need not grow with logits in the very last bit.
            heaviest = weights_of(tl.load(best_ptr + row * TILES + tile), best, scale, min_p)
            heaviest = heaviest.to(tl.int32, bitcast=True)
            if heaviest + 16 > most_of(deepest + 1):
                offsets = tile * TILE + tl.arange(0, TILE)
                bits = tile_bits(logits_ptr + row * VOCAB, offsets, best, scale, min_p, VOCAB)
                at = bin_of(bits)
                is_kept = ((at >= from_t) & (at <= to_t)) | ((at >= from_p) & (at <= to_p))
                is_kept = (is_kept | ((at >= from_k) & (at <= to_k))) & (lengths_of(bits) > 0)
                kept = is_kept.to(tl.int32)
                first = tl.atomic_add(num_listed_ptr + row, tl.sum(kept, axis=0))
                place = first + tl.cumsum(kept, axis=0) - 1
                is_kept = is_kept & (place < LIST)
                tl.store(bits_ptr + row * LIST + place, bits, mask=is_kept)
                tl.store(ids_ptr + row * LIST + place, offsets, mask=is_kept)
