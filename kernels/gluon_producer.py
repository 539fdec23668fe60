"""The producer of Gluon prefill attention: one warp that draws work and has tiles copied."""

from __future__ import annotations

from typing import Any

from kernels.gluon_api import async_load, gl, gluon_jit, mbarrier, next_stage, post, reinterpret


@gluon_jit
def produce(
    queries: gl.tensor, pool: gl.tensor, tables_ptr: gl.tensor, tiles_ptr: gl.tensor,
    memory: gl.tensor, full: gl.tensor, empty: gl.tensor, table_stride: gl.tensor,
    outside: gl.tensor, section: gl.tensor, HEADS: gl.constexpr, KV_HEADS: gl.constexpr,
    HEAD_SIZE: gl.constexpr, PAGE: gl.constexpr, TILE: gl.constexpr, ROWS: gl.constexpr,
    KEY_STAGES: gl.constexpr, VALUE_STAGES: gl.constexpr, QUERY_STAGES: gl.constexpr,
    WINDOW: gl.constexpr,
) -> None:  # fmt: skip
    mail, query, keys, values = memory
    mail_full, query_full, keys_full, values_full = full
    mail_empty, query_empty, keys_empty, values_empty = empty
    HALVES: gl.constexpr = HEAD_SIZE // 64
    num_pieces = gl.load(tiles_ptr)
    num_work = num_pieces * HEADS
    key_stage, key_phase, value_stage, value_phase = 0, 1, 0, 1
    slot, slot_phase, query_stage, query_phase = 0, 1, 0, 1
    work = gl.program_id(0)
    while work < num_work:
        ticket = gl.atomic_add(tiles_ptr + 1, 1)
        if ticket == num_work - 1:  # nobody draws after this: ready for the next launch
            gl.store(tiles_ptr + 1, 0)
        rest = work % (num_pieces * section)
        head = work // (num_pieces * section) * section + rest % section
        piece_ptr = tiles_ptr + 4 + rest // section * 4
        token = gl.load(piece_ptr)
        rows = gl.load(piece_ptr + 1)
        position = gl.load(piece_ptr + 2)
        sequence = gl.load(piece_ptr + 3).to(gl.int64)
        mbarrier.wait(mail_empty.index(slot), slot_phase)
        _announce(mail, mail_full, slot, token, rows, position, head)
        _load_queries(
            queries, query, query_full, query_empty, query_stage, query_phase, token, head,
            HEAD_SIZE, HALVES, ROWS, QUERY_STAGES,
        )  # fmt: skip
        slot, slot_phase = next_stage(slot, slot_phase, 2)
        query_stage, query_phase = next_stage(query_stage, query_phase, QUERY_STAGES)
        kv_head = head // (HEADS // KV_HEADS)
        end = position + rows
        start = first_key(position, WINDOW)
        table_ptr = tables_ptr + sequence * table_stride
        for tile in range(start // TILE * TILE, end, TILE):
            mbarrier.wait(keys_empty.index(key_stage), key_phase)
            _load_tile(
                pool, table_ptr, keys, keys_full, key_stage, tile, start, end, kv_head, outside,
                KV_HEADS, HALVES, PAGE, TILE, KEY_STAGES,
            )  # fmt: skip
            mbarrier.wait(values_empty.index(value_stage), value_phase)
            _load_tile(
                pool, table_ptr, values, values_full, value_stage, tile, start, end,
                kv_head + KV_HEADS, outside, KV_HEADS, HALVES, PAGE, TILE, VALUE_STAGES,
            )  # fmt: skip
            key_stage, key_phase = next_stage(key_stage, key_phase, KEY_STAGES)
            value_stage, value_phase = next_stage(value_stage, value_phase, VALUE_STAGES)
        work = ticket + gl.num_programs(0)
    mbarrier.wait(mail_empty.index(slot), slot_phase)
    _announce(mail, mail_full, slot, 0, 0, 0, 0)  # no rows: the end


@gluon_jit
def _announce(
    mail: gl.tensor, mail_full: gl.tensor, slot: gl.tensor, token: gl.tensor, rows: gl.tensor,
    position: gl.tensor, head: gl.tensor,
) -> None:  # fmt: skip
    """Tells the consumers of a piece: its first query token, queries, first position, head."""
    post(mail.index(slot * 4), token)
    post(mail.index(slot * 4 + 1), rows)
    post(mail.index(slot * 4 + 2), position)
    post(mail.index(slot * 4 + 3), head)
    mbarrier.arrive(mail_full.index(slot), count=1)


@gluon_jit
def _load_queries(
    queries: gl.tensor, query: gl.tensor, query_full: gl.tensor, query_empty: gl.tensor,
    stage: gl.tensor, phase: gl.tensor, token: gl.tensor, head: gl.tensor,
    HEAD_SIZE: gl.constexpr, HALVES: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr,
) -> None:  # fmt: skip
    """Starts copying the queries of a piece. Rows behind its last are those of other sequences."""
    boxes = reinterpret(query, query.dtype, [2 * STAGES * HALVES, ROWS // 2, 64], queries.layout)
    for half in gl.static_range(2):
        place = stage * 2 + half
        mbarrier.wait(query_empty.index(place), phase)
        mbarrier.expect(query_full.index(place), ROWS // 2 * HEAD_SIZE * 2)
        for part in gl.static_range(HALVES):
            corner = [token + half * (ROWS // 2), head * HEAD_SIZE + part * 64]
            box = boxes.index(place * HALVES + part)
            async_load(queries, corner, query_full.index(place), box)


@gluon_jit
def _load_tile(
    pool: gl.tensor, table_ptr: gl.tensor, tiles: gl.tensor, full: gl.tensor, stage: gl.tensor,
    tile: gl.tensor, start: gl.tensor, end: gl.tensor, side_head: gl.tensor,
    outside: gl.tensor, KV_HEADS: gl.constexpr, HALVES: gl.constexpr, PAGE: gl.constexpr,
    TILE: gl.constexpr, STAGES: gl.constexpr,
) -> None:  # fmt: skip
    """Starts copying the keys or values from position `tile` on into their stage."""
    PAGES: gl.constexpr = TILE // PAGE
    boxes = reinterpret(tiles, tiles.dtype, [STAGES * HALVES * PAGES, PAGE, 64], pool.layout)
    mbarrier.expect(full.index(stage), TILE * HALVES * 128)
    for i in gl.static_range(PAGES):
        page = tile // PAGE + i
        known = (page >= start // PAGE) & (page * PAGE < end)
        block = gl.load(table_ptr + page, mask=known, other=0)
        row = gl.where(known, (block * (2 * KV_HEADS) + side_head) * PAGE, outside)
        for part in gl.static_range(HALVES):
            box = boxes.index(stage * (HALVES * PAGES) + part * PAGES + i)
            async_load(pool, [row, part * 64], full.index(stage), box)


@gluon_jit
def first_key(position: gl.tensor, WINDOW: gl.constexpr) -> Any:
    """The first key that the query at a position sees."""
    key = 0
    if WINDOW > 0:
        key = gl.maximum(position - WINDOW + 1, 0)
    return key
