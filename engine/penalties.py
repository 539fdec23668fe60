"""What changes logits before a draw: penalties, biases, and bans of tokens that would end it.

All three touch few tokens of a row, so they are lists of (row, token id, value), gathered,
computed and scattered; no [n, vocab] table of counts exists anywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from collections.abc import Sequence as SequenceOf

    import numpy.typing as npt

_MIN_CAPACITY = 64


def to_device(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """A tensor of the same contents; its copy to a GPU is queued, the host does not wait."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    if not array.size:  # of most batches
        return torch.empty(array.shape, dtype=tensor.dtype, device=device)
    return tensor.pin_memory().to(device, non_blocking=True)


class TokenCounts:
    """The distinct tokens of one sequence and how often its output has each, kept up to date.

    `includes_prompt`: prompt tokens are listed too, with count 0 until they are put out.
    """

    __slots__ = ("_counts", "_ids", "_index", "_num_seen")

    def __init__(
        self, token_ids: SequenceOf[int], num_prompt_tokens: int, *, includes_prompt: bool
    ) -> None:
        prompt = np.array(token_ids[:num_prompt_tokens] if includes_prompt else (), np.int64)
        distinct = np.unique(prompt)
        self._index = {token_id: place for place, token_id in enumerate(distinct.tolist())}
        capacity = max(_MIN_CAPACITY, 2 * len(distinct))
        self._ids = np.zeros(capacity, np.int64)
        self._counts = np.zeros(capacity, np.int64)
        self._ids[: len(distinct)] = distinct
        self._num_seen = num_prompt_tokens

    def update(self, token_ids: SequenceOf[int]) -> None:
        """Count the tokens put out since the last call. O(new tokens)."""
        for token_id in token_ids[self._num_seen :]:
            place = self._index.setdefault(token_id, len(self._index))
            if place == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[place] = token_id
            self._counts[place] += 1
        self._num_seen = len(token_ids)

    def __len__(self) -> int:
        return len(self._index)

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        return self._ids[: len(self._index)]

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        return self._counts[: len(self._index)]


def apply_penalties(
    logits: torch.Tensor,
    rows: SequenceOf[int],
    counts: SequenceOf[TokenCounts],
    strengths: torch.Tensor,
    pending: torch.Tensor,
) -> None:
    """Change `logits` [n, vocab] in place at the counted tokens of `rows`.

    `strengths` float32 [3, len(rows)]: repetition (divides what is positive, multiplies what
    is negative), frequency (times the count), presence (once). `pending` int64 [len(rows)]: a
    token put out that is not counted yet, known to the device alone; -1 where there is none.
    """
    lengths = [len(count) for count in counts]
    index = np.stack(
        [
            np.repeat(np.array(rows, np.int64), lengths),
            np.concatenate([count.ids for count in counts]),
            np.concatenate([count.counts for count in counts]),
            np.repeat(np.arange(len(rows), dtype=np.int64), lengths),
        ]
    )
    row, token_id, count, place = to_device(index, logits.device)
    is_pending = token_id == pending[place]
    value = logits[row, token_id]
    logits[row, token_id] = _penalized(value, count + is_pending, strengths[:, place])
    is_listed = torch.zeros_like(pending).index_add_(0, place, is_pending.long())
    row, token_id = to_device(np.array(rows, np.int64), logits.device), pending.clamp(min=0)
    value = logits[row, token_id]
    is_new = (pending >= 0) & (is_listed == 0)
    changed = _penalized(value, torch.ones_like(pending), strengths)
    logits[row, token_id] = torch.where(is_new, changed, value)


def _penalized(value: torch.Tensor, count: torch.Tensor, strengths: torch.Tensor) -> torch.Tensor:
    repetition, frequency, presence = strengths
    value = torch.where(value > 0, value / repetition, value * repetition)
    return value.sub_(frequency * count).sub_(presence * (count > 0))


class TokenValues(NamedTuple):
    """Distinct tokens, int64 [n], and a float32 [n] for each. Made once for a sequence: a batch
    whose rows have a thousand each must not go through them one by one whenever it changes."""

    token_ids: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, float]]) -> TokenValues | None:
        """None if there are no pairs. A later pair of an id wins."""
        values = dict(pairs)
        if not values:
            return None
        return cls(np.array([*values], np.int64), np.array([*values.values()], np.float32))


class TokenEdits:
    """(row, token id) pairs with values, on the device."""

    __slots__ = ("_index", "_values")

    def __init__(self, edits: Mapping[int, TokenValues], device: torch.device) -> None:
        """`edits`: by row, of one at least."""
        token_ids = [each.token_ids for each in edits.values()]
        rows = np.repeat(np.array([*edits], np.int64), [len(each) for each in token_ids])
        self._index = to_device(np.stack([rows, np.concatenate(token_ids)]), device)
        values = np.concatenate([each.values for each in edits.values()])
        self._values = to_device(values, device)

    def add_to(self, logits: torch.Tensor) -> None:
        row, token_id = self._index
        logits[row, token_id] += self._values

    def replace_in(self, logits: torch.Tensor) -> None:
        row, token_id = self._index
        logits[row, token_id] = self._values
