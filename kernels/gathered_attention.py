"""Attention over paged KV on the CPU: what both attention kernels' references are made of.

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

Decode is the case of one query token per sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["gathered_attention"]

_QUERY_STEP = 64
# Score elements of one step: bounds the scratch of a long or large group (32 MiB of float32).
_MAX_SCORES = 1 << 23
# What extents of bfloat16 products are multiples of.
_QUERY_GRAIN = 16
_KEY_GRAIN = 16
# Gathered bytes of one group of several sequences: about a share of the last-level cache.
_MAX_GATHERED_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class _Span:
    """The query tokens of one sequence and the blocks whose keys they may see."""

    row: int
    first_token: int
    query_len: int
    seq_len: int
    first_block: int
    num_blocks: int
    # Place of the first query token among the gathered keys.
    first_position: int


def gathered_attention(
    query: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    first_tokens: Sequence[int],
    seq_lens: Sequence[int],
    *,
    scale: float,
    out: torch.Tensor,
    sliding_window: int | None,
) -> None:
    """Causal attention of the last query tokens of every sequence, written to `out`.

    Sequence s owns the query tokens first_tokens[s] up to first_tokens[s + 1] (one entry more than
    sequences); they sit at its last positions. Sequences without a query token or with seq_len 0
    are skipped. Tensors as in `prefill_attention`.
    """
    block_size = kv_layer.shape[3]
    spans = _spans(first_tokens, seq_lens, block_size, sliding_window)
    for group in _groups(spans, kv_layer[:1].nbytes):
        key, value = _gather(kv_layer, block_tables, group)
        _attend(query, key, value, group, scale=scale, out=out, sliding_window=sliding_window)


def _spans(
    first_tokens: Sequence[int],
    seq_lens: Sequence[int],
    block_size: int,
    sliding_window: int | None,
) -> list[_Span]:
    spans = []
    for row, seq_len in enumerate(seq_lens):
        first_token = first_tokens[row]
        query_len = first_tokens[row + 1] - first_token
        if query_len == 0 or seq_len == 0:
            continue
        position = seq_len - query_len
        first_key = 0 if sliding_window is None else max(0, position - sliding_window + 1)
        first_block = first_key // block_size
        num_blocks = -(-seq_len // block_size) - first_block
        first_position = position - first_block * block_size
        spans.append(
            _Span(row, first_token, query_len, seq_len, first_block, num_blocks, first_position)
        )
    return spans


def _groups(spans: list[_Span], bytes_per_block: int) -> Iterable[list[_Span]]:
    """Spans of similar extent together, each group in the order of its rows."""
    group: list[_Span] = []
    for span in sorted(spans, key=lambda s: (s.query_len, s.num_blocks), reverse=True):
        if group:
            most = max(span.num_blocks, max(s.num_blocks for s in group))
            least = min(span.num_blocks, min(s.num_blocks for s in group))
            gathered = (len(group) + 1) * most * bytes_per_block
            # Less than double: one-block sequences stay among themselves, see `_block_ids`.
            similar = most < 2 * least and group[0].query_len <= 2 * span.query_len
            if not similar or gathered > _MAX_GATHERED_BYTES:
                yield sorted(group, key=lambda s: s.row)
                group = []
        group.append(span)
    if group:
        yield sorted(group, key=lambda s: s.row)


def _gather(
    kv_layer: torch.Tensor, block_tables: torch.Tensor, group: list[_Span]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense keys and values of a group, each `[members * num_kv_heads, keys, head_size]`."""
    _, _, num_kv_heads, block_size, head_size = kv_layer.shape
    num_blocks = max(span.num_blocks for span in group)
    rounds = kv_layer.dtype == torch.bfloat16
    if rounds:
        num_blocks = _round_up(num_blocks)
    block_ids = _block_ids(block_tables, group, num_blocks)
    members = len(group)
    # Pool rows of one (block, side, head), ordered [side, member, head, block].
    rows = torch.arange(2 * num_kv_heads).view(2, 1, num_kv_heads, 1)
    rows = rows + (block_ids * (2 * num_kv_heads)).unsqueeze(1)
    gathered = kv_layer.view(-1, block_size * head_size).index_select(0, rows.view(-1))
    if members > 1 or rounds:
        _clear_tails(gathered.view(2, members, num_kv_heads, num_blocks, block_size, -1)[1], group)
    key, value = gathered.view(2, members * num_kv_heads, num_blocks * block_size, head_size)
    return key, value


def _round_up(n: int) -> int:
    """n rounded up to a multiple of an eighth of its power of two."""
    grain = max(1, (1 << (n - 1).bit_length()) // 16)
    return -(-n // grain) * grain


def _block_ids(block_tables: torch.Tensor, group: list[_Span], num_blocks: int) -> torch.Tensor:
    """int64 `[members, num_blocks]`; past its last block a sequence repeats its first one.

    That one is full of the sequence's own tokens: where blocks are missing, it is not the last.
    """
    if len(group) == 1 and num_blocks == group[0].num_blocks:
        first = group[0].first_block
        return block_tables[group[0].row, first : first + num_blocks].long().unsqueeze(0)
    place = torch.arange(num_blocks)
    count = torch.tensor([[span.num_blocks] for span in group])
    first_block = torch.tensor([[span.first_block] for span in group])
    columns = torch.where(place < count, place, 0).add_(first_block)
    tables = block_tables
    if len(group) < len(block_tables):
        tables = block_tables[[span.row for span in group]]
    return tables.gather(1, columns).long()


def _clear_tails(value: torch.Tensor, group: list[_Span]) -> None:
    """Zeroes what `[members, heads, blocks, block_size, head_size]` holds past each seq_len."""
    block_size = value.shape[3]
    member = torch.arange(len(group))
    last_block = torch.tensor([span.num_blocks - 1 for span in group])
    filled = torch.tensor([[(span.seq_len - 1) % block_size + 1] for span in group])
    beyond = (torch.arange(block_size) >= filled)[:, None, :, None]
    value[member, :, last_block] = value[member, :, last_block].masked_fill_(beyond, 0)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    group: list[_Span],
    *,
    scale: float,
    out: torch.Tensor,
    sliding_window: int | None,
) -> None:
    if query.dtype == torch.float16:  # a float16 matrix product on the CPU is several times slower
        key, value = key.float(), value.float()
    rounds = query.dtype == torch.bfloat16
    members, (_, num_heads, head_size) = len(group), query.shape
    most_queries = max(span.query_len for span in group)
    fit = _MAX_SCORES // (members * num_heads * key.shape[1])
    step = min(_QUERY_STEP, max(_QUERY_GRAIN, fit // _QUERY_GRAIN * _QUERY_GRAIN))
    for start in range(0, most_queries, step):
        stop = min(start + step, most_queries)
        num_keys = max(_position(span, stop - 1) for span in group) + 1
        if rounds and most_queries > 1:
            stop = start - (start - stop) // _QUERY_GRAIN * _QUERY_GRAIN
        if rounds:
            num_keys = min(key.shape[1], _round_up(-(-num_keys // _KEY_GRAIN)) * _KEY_GRAIN)
        tokens = _tokens(group, start, stop)
        shape = (members, stop - start, len(key) // members, -1, head_size)
        # [members, queries, kv heads, group, size] -> [members * kv heads, group * queries, size]
        packed = query[tokens].view(shape).permute(0, 2, 3, 1, 4).to(key.dtype)
        packed = packed.reshape(len(key), -1, head_size)
        scores = packed.new_empty(1).expand(len(key), packed.shape[1], num_keys)
        scores = torch.baddbmm(scores, packed, key[:, :num_keys].mT, beta=0, alpha=scale)
        by_member = scores.view(members, -1, stop - start, num_keys)
        _mask(by_member, group, start, stop, sliding_window)
        result = torch.bmm(torch.softmax(scores, dim=-1), value[:, :num_keys])
        result = result.view(members, shape[2], -1, stop - start, head_size).permute(0, 3, 1, 2, 4)
        if isinstance(tokens, slice):
            out[tokens].view(shape).copy_(result)
        else:
            out[tokens] = result.reshape(*tokens.shape, num_heads, head_size).to(out.dtype)


def _position(span: _Span, query: int) -> int:
    """Where query token `query` of a span sits among its keys; past its end the last one repeats.

    A repeated token is computed more than once and stored more than once, with the same result.
    """
    return span.first_position + min(query, span.query_len - 1)


def _tokens(group: list[_Span], start: int, stop: int) -> slice | torch.Tensor:
    """Which query tokens are number `start` up to `stop` of each span: int64 `[members, queries]`.

    A slice where they lie one after the other, which makes views of what would be copies.
    """
    first = group[0].first_token
    if len(group) == 1 and stop <= group[0].query_len:
        return slice(first + start, first + stop)
    if all(s.query_len == 1 and s.first_token == first + i for i, s in enumerate(group)):
        return slice(first, first + len(group))
    begin = torch.tensor([[span.first_token] for span in group])
    last = torch.tensor([[span.query_len - 1] for span in group])
    return torch.arange(start, stop).minimum(last) + begin


def _mask(
    scores: torch.Tensor, group: list[_Span], start: int, stop: int, sliding_window: int | None
) -> None:
    """Sets `[members, heads, queries, keys]` to -inf where a query must not see a key."""
    num_keys = scores.shape[3]
    # Before this key nothing is hidden, unless a window hides it.
    seen = min(_position(span, start) for span in group) + 1
    if sliding_window is not None:
        seen = 0
    if seen >= num_keys:
        return
    first = torch.tensor([[span.first_position] for span in group])
    last = torch.tensor([[span.query_len - 1] for span in group])
    position = (torch.arange(start, stop).minimum(last) + first).unsqueeze(-1)
    keys = torch.arange(seen, num_keys)
    hidden = keys > position
    if sliding_window is not None:
        hidden |= keys <= position - sliding_window
    scores[..., seen:].masked_fill_(hidden.unsqueeze(1), -math.inf)
