"""The consumers of Gluon prefill attention: a warpgroup each for one half of a piece's queries."""

from __future__ import annotations

from typing import Any

from kernels.gluon_api import (
    HAS_GLUON,
    barrier,
    fence_async_shared,
    gl,
    gluon_constexpr,
    gluon_jit,
    mbarrier,
    next_stage,
    read,
    reinterpret,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from kernels.gluon_producer import first_key


@gluon_jit
def consume(
    half: gl.constexpr, out_ptr: gl.tensor, memory: gl.tensor, full: gl.tensor, empty: gl.tensor,
    scale_log2: gl.tensor, HEADS: gl.constexpr, HEAD_SIZE: gl.constexpr, PAGE: gl.constexpr,
    TILE: gl.constexpr, ROWS: gl.constexpr, KEY_STAGES: gl.constexpr, VALUE_STAGES: gl.constexpr,
    QUERY_STAGES: gl.constexpr, WINDOW: gl.constexpr,
) -> None:  # fmt: skip
    """One piece after the other until one comes that has no rows."""
    mail, queries, keys, values = memory
    mail_full, query_full, keys_full, values_full = full
    mail_empty, query_empty, keys_empty, values_empty = empty
    M: gl.constexpr = ROWS // 2
    # Stage and phase of the next tile of keys, and of values.
    places = (0, 0, 0, 0)
    slot, slot_phase, query_stage, query_phase = 0, 0, 0, 0
    mbarrier.wait(mail_full.index(0), 0)
    rows = read(mail.index(1))
    while rows > 0:
        token = read(mail.index(slot * 4))
        position = read(mail.index(slot * 4 + 2))
        head = read(mail.index(slot * 4 + 3))
        mbarrier.arrive(mail_empty.index(slot), count=1)
        mbarrier.wait(query_full.index(query_stage * 2 + half), query_phase)
        query = queries.index(query_stage * 2 + half)
        query_freed = query_empty.index(query_stage * 2 + half)
        result, places = _attend(
            query, query_freed, keys, values, keys_full, values_full, keys_empty, values_empty,
            places, position, position + rows, position + half * M, scale_log2,
            HEAD_SIZE, PAGE, TILE, M, KEY_STAGES, VALUE_STAGES, WINDOW,
        )  # fmt: skip
        _store(result, out_ptr, token, rows, half * M, head, HEADS, HEAD_SIZE, M)
        query_stage, query_phase = next_stage(query_stage, query_phase, QUERY_STAGES)
        slot, slot_phase = next_stage(slot, slot_phase, 2)
        mbarrier.wait(mail_full.index(slot), slot_phase)
        rows = read(mail.index(slot * 4 + 1))


@gluon_jit
def _attend(
    query: gl.tensor, query_freed: gl.tensor, keys: gl.tensor, values: gl.tensor,
    keys_full: gl.tensor, values_full: gl.tensor, keys_empty: gl.tensor, values_empty: gl.tensor,
    places: gl.tensor, position: gl.tensor, end: gl.tensor, first: gl.tensor,
    scale_log2: gl.tensor, HEAD_SIZE: gl.constexpr, PAGE: gl.constexpr, TILE: gl.constexpr,
    M: gl.constexpr, KEY_STAGES: gl.constexpr, VALUE_STAGES: gl.constexpr, WINDOW: gl.constexpr,
) -> Any:  # fmt: skip
    """The result of half a piece, and the places behind its last tile.

    The piece spans positions from `position` up to `end`, this half's first query is at `first`.
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_SIZE, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, RESULT, 2)
    key_stage, key_phase, value_stage, value_phase = places
    start = first_key(position, WINDOW) // TILE * TILE
    row_position = first + gl.arange(0, M, layout=gl.SliceLayout(1, SCORES))
    result = gl.zeros([M, HEAD_SIZE], gl.float32, layout=RESULT)
    base = gl.full([M], float("-inf"), gl.float32, layout=gl.SliceLayout(1, SCORES))
    total = gl.zeros([M], gl.float32, layout=gl.SliceLayout(1, SCORES))
    mbarrier.wait(keys_full.index(key_stage), key_phase)
    scoring = _score(query, keys.index(key_stage), M, TILE, SCORES)
    scores = warpgroup_mma_wait(0, deps=[scoring])
    mbarrier.arrive(keys_empty.index(key_stage), count=1)
    weights, decay, base, total = _fold(
        scores, start, first, row_position, base, total, scale_log2, TILE, WINDOW
    )
    weights = gl.convert_layout(weights.to(query.dtype), WEIGHTS)
    key_stage, key_phase = next_stage(key_stage, key_phase, KEY_STAGES)
    for tile in range(start + TILE, end, TILE):
        mbarrier.wait(keys_full.index(key_stage), key_phase)
        scoring = _score(query, keys.index(key_stage), M, TILE, SCORES)
        mbarrier.wait(values_full.index(value_stage), value_phase)
        adding = warpgroup_mma(weights, values.index(value_stage), result, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scoring])
        mbarrier.arrive(keys_empty.index(key_stage), count=1)
        weights, decay, base, total = _fold(
            scores, tile, first, row_position, base, total, scale_log2, TILE, WINDOW
        )
        # Long complete. Keeps the assembler from moving the next line above the softmax.
        mbarrier.wait(values_full.index(value_stage), value_phase)
        result = warpgroup_mma_wait(0, deps=[adding])
        mbarrier.arrive(values_empty.index(value_stage), count=1)
        key_stage, key_phase = next_stage(key_stage, key_phase, KEY_STAGES)
        value_stage, value_phase = next_stage(value_stage, value_phase, VALUE_STAGES)
        result = _rescale(result, gl.convert_layout(decay, gl.SliceLayout(1, RESULT)))
        weights = gl.convert_layout(weights.to(query.dtype), WEIGHTS)
    mbarrier.arrive(query_freed, count=1)
    mbarrier.wait(values_full.index(value_stage), value_phase)
    _clear_tail(values, value_stage, end, HEAD_SIZE // 64, PAGE, TILE, VALUE_STAGES)
    adding = warpgroup_mma(weights, values.index(value_stage), result, is_async=True)
    # A row past the chunk's end may see nothing at all.
    share = 1.0 / gl.where(total > 0, total, 1.0)
    result = warpgroup_mma_wait(0, deps=[adding])
    mbarrier.arrive(values_empty.index(value_stage), count=1)
    value_stage, value_phase = next_stage(value_stage, value_phase, VALUE_STAGES)
    result = result * gl.convert_layout(share, gl.SliceLayout(1, RESULT))[:, None]
    return result.to(query.dtype), (key_stage, key_phase, value_stage, value_phase)


@gluon_jit
def _score(
    query: gl.tensor, key: gl.tensor, M: gl.constexpr, TILE: gl.constexpr, SCORES: gl.constexpr
) -> Any:  # fmt: skip
    """Starts multiplying queries with a tile of keys."""
    nothing = gl.zeros([M, TILE], gl.float32, layout=SCORES)
    return warpgroup_mma(query, key.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon_jit
def _fold(
    scores: gl.tensor, tile: gl.tensor, first: gl.tensor, row_position: gl.tensor,
    base: gl.tensor, total: gl.tensor, scale_log2: gl.tensor, TILE: gl.constexpr,
    WINDOW: gl.constexpr,
) -> Any:  # fmt: skip
    """Weights of a tile's keys, what results so far are to be multiplied by, base and total.

    Weights are powers of two relative to the base, which follows a row's peak only when that has
    grown by more than 8: in between weights are up to 256, which changes no result.
    """
    masked = tile + TILE > first + 1  # not all queries see the whole tile
    if WINDOW > 0:
        masked = True
    if masked:
        key = tile + gl.arange(0, TILE, layout=gl.SliceLayout(0, scores.type.layout))
        hidden = key[None, :] > row_position[:, None]
        if WINDOW > 0:
            hidden = hidden | (key[None, :] <= row_position[:, None] - WINDOW)
        scores = gl.where(hidden, float("-inf"), scores)
    peak = gl.max(scores, axis=1) * scale_log2
    new_base = gl.where(peak > base + 8.0, peak, base)
    finite = new_base
    if WINDOW > 0:  # may hide a whole tile from a query; its base is then still -inf
        finite = gl.where(new_base == float("-inf"), 0.0, new_base)
    weights = gl.exp2(scores * scale_log2 - finite[:, None])
    decay = gl.exp2(base - finite)
    return weights, decay, new_base, total * decay + gl.sum(weights, axis=1)


# Of a thread's 32 elements every other pair belongs to one of two rows. If no row of the warp is to
# be scaled, 32 multiplications are skipped.
_OUT, _IN, _BY = ([f"${32 * n + i}" for i in range(32)] for n in range(3))
_SCALE_ROWS = (
    "{\n.reg .pred p, q;\n.reg .f32 least;\n"
    f"min.f32 least, {_BY[0]}, {_BY[2]};\n"
    "setp.ne.f32 p, least, 0f3F800000;\n"
    "vote.sync.any.pred q, p, 0xffffffff;\n"
    "@!q bra DONE;\n"
    + "".join(f"mul.f32 {out}, {out}, {by};\n" for out, by in zip(_OUT, _BY, strict=True))
    + "DONE:\n}"
)
_SCALE_OPERANDS = ",".join(["=f"] * 32 + [str(i) for i in range(32)] + ["f"] * 32)
if HAS_GLUON:
    _SCALE_ROWS, _SCALE_OPERANDS = gl.constexpr(_SCALE_ROWS), gl.constexpr(_SCALE_OPERANDS)


@gluon_jit
def _rescale(result: gl.tensor, decay: gl.tensor) -> Any:
    """The rows of `result` times `decay` <= 1."""
    factors = decay[:, None] + gl.zeros_like(result)
    return gl.inline_asm_elementwise(
        _SCALE_ROWS, _SCALE_OPERANDS, [result, factors], dtype=gl.float32, is_pure=True, pack=32
    )


@gluon_jit
def _clear_tail(
    values: gl.tensor, stage: gl.tensor, end: gl.tensor, HALVES: gl.constexpr, PAGE: gl.constexpr,
    TILE: gl.constexpr, STAGES: gl.constexpr,
) -> None:  # fmt: skip
    """Zeros for the values from position `end` on in the page of the last token.

    Both consumers write the same: neither has to wait for the other.
    """
    if end % PAGE != 0:
        PAGES: gl.constexpr = TILE // PAGE
        MATRIX: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
        LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        pages = reinterpret(values, values.dtype, [STAGES * HALVES * PAGES, PAGE, 64], MATRIX)
        kept = gl.arange(0, PAGE, layout=gl.SliceLayout(1, LAYOUT)) < end % PAGE
        for part in gl.static_range(HALVES):
            page = pages.index(stage * (HALVES * PAGES) + part * PAGES + end % TILE // PAGE)
            value = page.load(LAYOUT)
            page.store(gl.where(kept[:, None], value, gl.zeros_like(value)))
        fence_async_shared()
        barrier()


@gluon_constexpr
def _quads(head_size: int) -> Any:
    """The layout of `[64, head_size]` that differs from a product's in that a thread holds 4
    consecutive columns, so that the threads of a row write 32 bytes."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0], *([0, 16 << i] for i in range(2 + head_size // 128))],
        lane_bases=[[0, 8], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, head_size],
    )


@gluon_jit
def _store(
    result: gl.tensor, out_ptr: gl.tensor, token: gl.tensor, rows: gl.tensor, first_row: gl.tensor,
    head: gl.tensor, HEADS: gl.constexpr, HEAD_SIZE: gl.constexpr, M: gl.constexpr,
) -> None:  # fmt: skip
    # A warp keeps the 16 rows that it has: only its threads exchange elements, to 16 bytes each.
    LAYOUT: gl.constexpr = _quads(HEAD_SIZE)
    row = first_row + gl.arange(0, M, layout=gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, HEAD_SIZE, layout=gl.SliceLayout(0, LAYOUT))
    row_ptr = out_ptr + ((token + row).to(gl.int64) * HEADS + head) * HEAD_SIZE
    out = gl.convert_layout(result, LAYOUT)
    gl.store(row_ptr[:, None] + column[None, :], out, mask=(row < rows)[:, None])
