"""The query tokens of a group of sequences in steps, each as large as its scores may be: part of
`attention_plan`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Integers: TypeAlias = NDArray[np.int64]

_QUERY_STEP = 64
# Score elements of one step: bounds the scratch of a long or large group (32 MiB of float32).
_MAX_SCORES = 1 << 23
# What extents of bfloat16 products are multiples of.
_QUERY_GRAIN = 16
_KEY_GRAIN = 16


@dataclass(frozen=True, slots=True)
class Pool:
    """What a plan needs to know of the KV pool and the queries."""

    num_heads: int
    num_kv_heads: int
    block_size: int
    head_size: int
    dtype: torch.dtype

    @property
    def block_elements(self) -> int:
        return 2 * self.num_kv_heads * self.block_size * self.head_size


class Spans(NamedTuple):
    """Sequences: their query tokens and the blocks whose keys they may see. int64, one each."""

    row: Integers
    first_token: Integers
    query_len: Integers
    first_block: Integers
    num_blocks: Integers
    # Place of the first query token among the gathered keys.
    first_position: Integers

    def only(self, places: Integers) -> Spans:
        return Spans(*(each[places] for each in self))


@dataclass(frozen=True, slots=True)
class QueryStep:
    """Query tokens that share matrix products: int64 `[members, queries]`, or a slice where they
    lie one after the other, which makes views of what would be copies.

    `hidden`: bool `[members, 1, queries, num_keys - seen]`, what must not be seen of the keys from
    number `seen` on; None if all of them may be.
    """

    tokens: slice | torch.Tensor
    num_queries: int
    num_keys: int
    seen: int
    hidden: torch.Tensor | None


def round_up(n: int) -> int:
    """n rounded up to a multiple of an eighth of its power of two."""
    grain = max(1, (1 << (n - 1).bit_length()) // 16)
    return -(-n // grain) * grain


def plan_steps(
    group: Spans, pool: Pool, num_gathered: int, rounds: bool, sliding_window: int | None
) -> list[QueryStep]:
    most_queries = int(group.query_len.max())
    fit = _MAX_SCORES // (len(group.row) * pool.num_heads * num_gathered)
    size = min(_QUERY_STEP, max(_QUERY_GRAIN, fit // _QUERY_GRAIN * _QUERY_GRAIN))
    steps = []
    for start in range(0, most_queries, size):
        stop = min(start + size, most_queries)
        num_keys = int(_position(group, stop - 1).max()) + 1
        if rounds and most_queries > 1:
            stop = start - (start - stop) // _QUERY_GRAIN * _QUERY_GRAIN
        if rounds:
            num_keys = min(num_gathered, round_up(-(-num_keys // _KEY_GRAIN)) * _KEY_GRAIN)
        tokens = _tokens(group, start, stop)
        seen, hidden = _hidden(group, start, stop, num_keys, sliding_window)
        steps.append(QueryStep(tokens, stop - start, num_keys, seen, hidden))
    return steps


def _position(group: Spans, query: int) -> Integers:
    """Where query token `query` of each span sits among its keys; past its end the last one
    repeats. A repeated token is computed and stored more than once, with the same result.
    """
    position: Integers = group.first_position + np.minimum(query, group.query_len - 1)
    return position


def _tokens(group: Spans, start: int, stop: int) -> slice | torch.Tensor:
    """Which query tokens are number `start` up to `stop` of each span."""
    members = len(group.row)
    first = int(group.first_token[0])
    if members == 1 and stop <= group.query_len[0]:
        return slice(first + start, first + stop)
    if stop == 1 and group.first_token[-1] == first + members - 1:
        return slice(first, first + members)
    last = group.query_len[:, None] - 1
    return torch.from_numpy(np.minimum(np.arange(start, stop), last) + group.first_token[:, None])


def _hidden(
    group: Spans, start: int, stop: int, num_keys: int, sliding_window: int | None
) -> tuple[int, torch.Tensor | None]:
    """How many leading keys all queries see, and which of the others each must not see."""
    # Before this key nothing is hidden, unless a window hides it.
    seen = 0 if sliding_window is not None else int(_position(group, start).min()) + 1
    if seen >= num_keys:
        return num_keys, None
    last = group.query_len[:, None] - 1
    position = np.minimum(np.arange(start, stop), last) + group.first_position[:, None]
    position = position[..., None]
    keys = np.arange(seen, num_keys)
    hidden = keys > position
    if sliding_window is not None:
        hidden |= keys <= position - sliding_window
    return seen, torch.from_numpy(hidden[:, None])
