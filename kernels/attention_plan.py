"""How a step's attention is computed on the CPU: planned once, then run in every layer.

What a plan holds is the same in all layers; `gathered_attention.py` runs it.

1. Sequences are grouped so that padding at most doubles a group's work and its gathered keys and
   values stay in cache; a long sequence is a group of its own.
2. A group's blocks are gathered into dense keys and values `[members * num_kv_heads, keys,
   head_size]` by one row copy per (block, head); only blocks inside the sliding window are read.
3. Slots that hold no token of the sequence are never trusted: a missing block is replaced by the
   sequence's first one and the rest of its last block is zeroed. Their weight is zero anyhow, but
   zero times the NaN that an earlier owner may have left would be NaN.
4. Queries go in steps of up to 64 tokens: the query heads of a KV head share one matrix product,
   keys after the step are not touched, and only the diagonal is masked.
5. bfloat16 products are compiled by oneDNN for every new shape, which takes milliseconds, and a
   decode step has a new number of keys each time. So their extents are rounded up a little: fewer
   than ten shapes per doubling. Their scores are rounded to bfloat16, as everywhere in that dtype.
   Small groups are computed in float32 instead, where a call costs a third as much. So is KV in
   float8, which no product takes.

Decode is the case of one query token per sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from kernels.attention_steps import Pool, QueryStep, Spans, plan_steps, round_up

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Integers: TypeAlias = NDArray[np.int64]

# Gathered bytes of one group of several sequences: about a share of the last-level cache.
_MAX_GATHERED_BYTES = 4 << 20
# Gathered elements up to which a decode group in bfloat16 is computed in float32.
_MAX_WIDENED = 3 << 16


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences that are computed together.

    `rows`: int64, rows of the pool `[.., block_size * head_size]` to gather, ordered [side, member,
    head, block]. `tails`: int64, rows of the gathered values `[.., head_size]` to zero.
    """

    members: int
    rows: torch.Tensor
    tails: torch.Tensor | None
    in_float: bool
    steps: list[QueryStep]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """One step's attention, for every layer whose pool has the same shape and the same window.

    `empty_rows`: int64, decode rows of length 0, whose output is zero.
    """

    groups: list[Group]
    empty_rows: torch.Tensor | None = None


def plan_decode(
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    kv_layer: torch.Tensor,
    *,
    num_heads: int,
    sliding_window: int | None,
) -> AttentionPlan:
    """Plans `paged_attention` of CPU tensors; shapes as there. Any layer's pool will do."""
    lengths = seq_lens.numpy()
    pool = _pool(kv_layer, num_heads)
    groups = _plan(block_tables, np.arange(len(lengths) + 1), lengths, pool, sliding_window)
    empty = np.flatnonzero(lengths == 0)
    return AttentionPlan(groups, torch.from_numpy(empty) if len(empty) else None)


def plan_prefill(
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    kv_layer: torch.Tensor,
    *,
    num_heads: int,
    sliding_window: int | None,
) -> AttentionPlan:
    """Plans `prefill_attention` of CPU tensors; shapes as there. Any layer's pool will do."""
    pool = _pool(kv_layer, num_heads)
    first_tokens, lengths = cu_seqlens_q.numpy(), seq_lens.numpy()
    return AttentionPlan(_plan(block_tables, first_tokens, lengths, pool, sliding_window))


def _pool(kv_layer: torch.Tensor, num_heads: int) -> Pool:
    _, _, num_kv_heads, block_size, head_size = kv_layer.shape
    return Pool(num_heads, num_kv_heads, block_size, head_size, kv_layer.dtype)


def _plan(
    block_tables: torch.Tensor,
    first_tokens: NDArray[np.integer],
    seq_lens: NDArray[np.integer],
    pool: Pool,
    sliding_window: int | None,
) -> list[Group]:
    """Sequence s owns the query tokens first_tokens[s] up to first_tokens[s + 1] (one entry more
    than sequences). Sequences without a query token or with seq_len 0 are left out."""
    tables = block_tables.numpy()
    spans = _spans(first_tokens, seq_lens, pool.block_size, sliding_window)
    # Float8 is widened when gathered.
    itemsize = 4 if pool.dtype == torch.float8_e4m3fn else pool.dtype.itemsize
    bytes_per_block = pool.block_elements * itemsize
    return [
        _plan_group(tables, group, pool, sliding_window)
        for group in _groups(spans, bytes_per_block)
    ]


def _spans(
    first_tokens: NDArray[np.integer],
    seq_lens: NDArray[np.integer],
    block_size: int,
    sliding_window: int | None,
) -> Spans:
    first_token = first_tokens[:-1].astype(np.int64)
    query_len = first_tokens[1:] - first_token
    length = seq_lens.astype(np.int64)
    position = length - query_len
    first_block = np.zeros_like(length)
    if sliding_window is not None:
        first_block = np.maximum(0, position - sliding_window + 1) // block_size
    num_blocks = -(-length // block_size) - first_block
    first_position = position - first_block * block_size
    row = np.arange(len(length))
    spans = Spans(row, first_token, query_len, first_block, num_blocks, first_position)
    used = (query_len > 0) & (length > 0)
    return spans if used.all() else spans.only(np.flatnonzero(used))


def _groups(spans: Spans, bytes_per_block: int) -> Iterator[Spans]:
    """Spans of similar extent together, each group in the order of its rows."""
    if len(spans.row) == 1:
        yield spans
        return
    order = np.lexsort((-spans.num_blocks, -spans.query_len))
    while len(order):
        num_blocks, query_len = spans.num_blocks[order], spans.query_len[order]
        most = np.maximum.accumulate(num_blocks)
        # Less than double: one-block sequences stay among themselves, see `_gathered_rows`.
        similar = most < 2 * np.minimum.accumulate(num_blocks)
        similar &= query_len[0] <= 2 * query_len
        similar &= np.arange(1, len(order) + 1) * most * bytes_per_block <= _MAX_GATHERED_BYTES
        size = len(order) if similar.all() else max(1, int(similar.argmin()))
        yield spans.only(np.sort(order[:size]))
        order = order[size:]


def _plan_group(
    tables: NDArray[np.int32], group: Spans, pool: Pool, sliding_window: int | None
) -> Group:
    members = len(group.row)
    num_blocks = int(group.num_blocks.max())
    most_queries = int(group.query_len.max())
    elements = members * num_blocks * pool.block_elements
    # A float16 matrix product on the CPU is several times slower than the detour.
    in_float = pool.dtype in (torch.float16, torch.float8_e4m3fn) or (
        pool.dtype == torch.bfloat16 and most_queries == 1 and elements <= _MAX_WIDENED
    )
    rounds = pool.dtype == torch.bfloat16 and not in_float
    if rounds:
        num_blocks = round_up(num_blocks)
    steps = plan_steps(group, pool, num_blocks * pool.block_size, rounds, sliding_window)
    rows = _gathered_rows(tables, group, num_blocks, pool.num_kv_heads)
    tails = None
    if members > 1 or rounds:
        tails = _tail_rows(group, num_blocks, pool)
    return Group(members, torch.from_numpy(rows), tails, in_float, steps)


def _gathered_rows(
    tables: NDArray[np.int32], group: Spans, num_blocks: int, num_kv_heads: int
) -> Integers:
    """Rows of the pool by [side, member, head, block]; past its last block a sequence repeats its
    first one. That one is full of the sequence's own tokens: where blocks are missing, it is not
    the last."""
    place = np.arange(num_blocks)
    columns = np.where(place < group.num_blocks[:, None], place, 0) + group.first_block[:, None]
    block_ids = tables[group.row[:, None], columns].astype(np.int64)
    sides = np.arange(2 * num_kv_heads).reshape(2, 1, num_kv_heads, 1)
    rows: Integers = sides + (block_ids * (2 * num_kv_heads))[:, None]
    return rows.reshape(-1)


def _tail_rows(group: Spans, num_blocks: int, pool: Pool) -> torch.Tensor | None:
    """Rows of the gathered values by [member, head, key]: what lies past a sequence's end in its
    last block. None if all last blocks are full."""
    num_keys = num_blocks * pool.block_size
    key = np.arange(num_keys)
    end = group.first_position + group.query_len
    filled = group.num_blocks * pool.block_size
    member, token = np.nonzero((key >= end[:, None]) & (key < filled[:, None]))
    if not len(member):
        return None
    head = np.arange(pool.num_kv_heads)
    rows = (member[:, None] * pool.num_kv_heads + head) * num_keys + token[:, None]
    return torch.from_numpy(rows.reshape(-1))
