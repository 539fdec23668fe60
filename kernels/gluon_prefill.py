"""Prefill attention on Hopper GPUs in Gluon: the schedule of FlashAttention 3 over a paged pool.

Life of a thread block (one per multiprocessor, for the whole launch)
    1. The producer warp draws pieces of work (128 queries of one head, see `prefill_tiles.py`) from
       a counter, the longest first, and tells the consumers of each through a mailbox.
    2. It lets the tensor memory accelerator copy the piece's queries, then tiles of 128 keys and
       of their values into shared memory. A page, which is what one (block, side, head) holds, is
       contiguous: a box for each 64 columns of it. The producer is ahead of the consumers by as
       many tiles as there are stages, also into the next piece.
    3. Two consumer warpgroups own 64 queries each. While a warpgroup weighs the scores of tile t,
       the tensor cores multiply its weights of tile t - 1 with their values, and what the other
       warpgroup asked for.

Keys that no query of a piece may see are never trusted. Pages before the window or past the end are
read from a row outside of the pool, which the accelerator fills with zeros. Values in the rest of
the last page are overwritten: zero times the NaN that an earlier owner may have left would be NaN.

Sources: FlashAttention 3 (Shah et al., 2024) for the overlap; FlashAttention 4 (2025) for scaling
results only when a row's peak has grown by much.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from kernels.dispatch import num_multiprocessors
from kernels.gluon_api import (
    Blocks,
    fence_async_shared,
    gl,
    gluon_jit_for_any,
    mbarrier,
    shared_layout,
)
from kernels.gluon_consumer import consume
from kernels.gluon_producer import produce
from kernels.prefill_tiles import PIECE

if TYPE_CHECKING:
    import torch

    from kernels.prefill_tiles import PrefillTiles

HEAD_SIZES = (64, 128)
MAX_PAGE = 128

_TILE = 128
# Buffers of keys, of values and of queries, 224 of the 227 KiB of shared memory. Values wait longer
# than keys for those that they replace.
_KEY_STAGES, _VALUE_STAGES, _QUERY_STAGES = 2, 3, 2
_NUM_WARPS = 4
# 65,536 registers over three warpgroups; consumers then take most of the producer's.
_REGISTERS = 168
# Keys and values of the heads that are worked on at a time should stay in the second-level cache.
_SECTION_BYTES = 18 << 20


def gluon_prefill(
    query: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    tiles: PrefillTiles,
    *,
    max_seqlen_q: int,
    scale: float,
    out: torch.Tensor,
    sliding_window: int | None,
) -> None:
    """`prefill_attention` on a Hopper GPU; tensors as there.

    float16 or bfloat16, head_size 64 or 128, the heads of a query token one behind the other,
    block_size up to 128. tiles: what `plan_tiles` made of the same lengths; counts as it is drawn
    from, so two streams must not use it at a time.
    """
    num_tokens, num_heads, head_size = query.shape
    _, _, num_kv_heads, page, _ = kv_layer.shape
    num_seqs = block_tables.shape[0]
    if num_tokens == 0 or num_seqs == 0:
        return
    assert query.stride(1) == head_size
    assert query.stride(2) == block_tables.stride(1) == 1
    num_rows = kv_layer.numel() // head_size
    layout = shared_layout(16, 2)
    queries = Blocks(
        query, [num_tokens, num_heads * head_size], [query.stride(0), 1], [PIECE // 2, 64], layout
    )
    pool = Blocks(kv_layer, [num_rows, head_size], [head_size, 1], [page, 64], layout)
    section = num_heads // num_kv_heads
    if num_tokens < 4 * max_seqlen_q:
        section *= kv_heads_at_a_time(num_kv_heads, block_tables.numel() * page * head_size)
    grid = min(num_multiprocessors(query.device), (len(tiles) - 1) * num_heads)
    _prefill_kernel[(grid,)](
        queries, pool, block_tables, tiles, out, block_tables.stride(0), num_rows, section,
        scale * math.log2(math.e), HEADS=num_heads, KV_HEADS=num_kv_heads, HEAD_SIZE=head_size,
        PAGE=page, TILE=_TILE, ROWS=PIECE, KEY_STAGES=_KEY_STAGES, VALUE_STAGES=_VALUE_STAGES,
        QUERY_STAGES=_QUERY_STAGES, WINDOW=sliding_window or 0,
        num_warps=_NUM_WARPS, maxnreg=_REGISTERS,
    )  # fmt: skip


def kv_heads_at_a_time(num_kv_heads: int, elements_per_head: int) -> int:
    """With how many KV heads' pieces to begin, before those of the others.

    As many as the cache holds: the longer a list of pieces, the more evenly it ends. But one where
    there are many sequences, so that long and short pieces mix: while all blocks work on short
    ones, their tensor cores wait for memory.
    """
    head_bytes = 4 * elements_per_head
    number = max(1, min(num_kv_heads, _SECTION_BYTES // head_bytes))
    while num_kv_heads % number:
        number -= 1
    return number


@gluon_jit_for_any("table_stride", "outside", "section")
def _prefill_kernel(
    queries: gl.tensor, pool: gl.tensor, tables_ptr: gl.tensor, tiles_ptr: gl.tensor,
    out_ptr: gl.tensor, table_stride: gl.tensor, outside: gl.tensor, section: gl.tensor,
    scale_log2: gl.tensor, HEADS: gl.constexpr, KV_HEADS: gl.constexpr, HEAD_SIZE: gl.constexpr,
    PAGE: gl.constexpr, TILE: gl.constexpr, ROWS: gl.constexpr, KEY_STAGES: gl.constexpr,
    VALUE_STAGES: gl.constexpr, QUERY_STAGES: gl.constexpr, WINDOW: gl.constexpr,
) -> None:  # fmt: skip
    """Everything shared, then the three roles. Queries are copied in halves, one for a consumer."""
    MATRIX: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    dtype: gl.constexpr = queries.dtype
    mail = gl.allocate_shared_memory(gl.int32, [8, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    query = gl.allocate_shared_memory(dtype, [2 * QUERY_STAGES, ROWS // 2, HEAD_SIZE], MATRIX)
    keys = gl.allocate_shared_memory(dtype, [KEY_STAGES, TILE, HEAD_SIZE], MATRIX)
    values = gl.allocate_shared_memory(dtype, [VALUE_STAGES, TILE, HEAD_SIZE], MATRIX)
    mail_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    mail_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    query_full = gl.allocate_shared_memory(gl.int64, [2 * QUERY_STAGES, 1], BARRIER)
    query_empty = gl.allocate_shared_memory(gl.int64, [2 * QUERY_STAGES, 1], BARRIER)
    keys_full = gl.allocate_shared_memory(gl.int64, [KEY_STAGES, 1], BARRIER)
    keys_empty = gl.allocate_shared_memory(gl.int64, [KEY_STAGES, 1], BARRIER)
    values_full = gl.allocate_shared_memory(gl.int64, [VALUE_STAGES, 1], BARRIER)
    values_empty = gl.allocate_shared_memory(gl.int64, [VALUE_STAGES, 1], BARRIER)
    for i in gl.static_range(2):
        mbarrier.init(mail_full.index(i), count=1)
        mbarrier.init(mail_empty.index(i), count=2)
    for i in gl.static_range(2 * QUERY_STAGES):
        mbarrier.init(query_full.index(i), count=1)
        mbarrier.init(query_empty.index(i), count=1)
    for i in gl.static_range(KEY_STAGES):
        mbarrier.init(keys_full.index(i), count=1)
        mbarrier.init(keys_empty.index(i), count=2)
    for i in gl.static_range(VALUE_STAGES):
        mbarrier.init(values_full.index(i), count=1)
        mbarrier.init(values_empty.index(i), count=2)
    fence_async_shared()
    memory = (mail, query, keys, values)
    full = (mail_full, query_full, keys_full, values_full)
    empty = (mail_empty, query_empty, keys_empty, values_empty)
    # fmt: off
    gl.warp_specialize(
        [
            (consume, (gl.constexpr(0), out_ptr, memory, full, empty, scale_log2, HEADS, HEAD_SIZE,
                        PAGE, TILE, ROWS, KEY_STAGES, VALUE_STAGES, QUERY_STAGES, WINDOW)),
            (consume, (gl.constexpr(1), out_ptr, memory, full, empty, scale_log2, HEADS, HEAD_SIZE,
                        PAGE, TILE, ROWS, KEY_STAGES, VALUE_STAGES, QUERY_STAGES, WINDOW)),
            (produce, (queries, pool, tables_ptr, tiles_ptr, memory, full, empty, table_stride,
                        outside, section, HEADS, KV_HEADS, HEAD_SIZE, PAGE, TILE, ROWS, KEY_STAGES,
                        VALUE_STAGES, QUERY_STAGES, WINDOW)),
        ],
        [4, 1],
        [240, 24],
    )
    # fmt: on
