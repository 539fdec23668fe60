"""The parameters of a batch's rows as arrays on the device, built when the batch changes.

Life of a row's parameters
    1. `SamplingRow`: made when its sequence is sampled first, kept on the sequence.
    2. `SamplingPlan`: made from the rows of a batch, kept as long as the next batch has the
       same rows in the same order, which while decoding is most steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from engine.penalties import TokenCounts, TokenEdits
from engine.stopping import ending_token_ids

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf
    from collections.abc import Set as AbstractSet

    import numpy.typing as npt

    from engine.sequence import Sequence

MAX_CANDIDATES = 1024  # a filtered draw looks at more tokens only if these are not enough
_MIN_TEMPERATURE = 1e-4  # below, weights of two tokens differ by more than float32 can hold


class SamplingRow:
    """What the sampler keeps of one sequence. Compared by identity."""

    __slots__ = ("banned_token_ids", "bias", "counts", "sampling")

    def __init__(
        self, sequence: Sequence, vocab_size: int, eos_token_ids: AbstractSet[int]
    ) -> None:
        sampling = sequence.sampling
        self.sampling = sampling
        self.bias = tuple(pair for pair in sampling.logit_bias if 0 <= pair[0] < vocab_size)
        self.banned_token_ids: tuple[int, ...] = ()  # until there are `min_tokens`
        if sampling.min_tokens > 0:
            ending = ending_token_ids(sampling, eos_token_ids)
            self.banned_token_ids = tuple(i for i in sorted(ending) if 0 <= i < vocab_size)
        self.counts: TokenCounts | None = None
        repeats = sampling.repetition_penalty != 1.0
        if repeats or sampling.frequency_penalty or sampling.presence_penalty:
            self.counts = TokenCounts(
                sequence.token_ids, sequence.num_prompt_tokens, includes_prompt=repeats
            )

    @property
    def is_filtered(self) -> bool:
        return self.sampling.top_k > 0 or self.sampling.top_p < 1.0

    @property
    def is_plain(self) -> bool:
        """Whether the best logit decides and nothing else is asked."""
        sampling = self.sampling
        return (
            sampling.is_greedy
            and sampling.num_logprobs is None
            and self.counts is None
            and not self.bias
            and not self.banned_token_ids
        )


@dataclass(frozen=True, slots=True)
class DrawGroup:
    """Rows that are drawn in the same way. `top_k` and `top_p` are None where not filtered."""

    places: npt.NDArray[np.int64]  # [m], in the batch
    rows: torch.Tensor  # int64 [m], the same on the device
    seeds: npt.NDArray[np.uint64]  # [m]
    temperature: torch.Tensor  # float32 [m, 1]
    min_p: torch.Tensor | None  # float32 [m, 1]
    top_k: torch.Tensor | None  # int64 [m, 1], 0: all
    top_p: torch.Tensor | None  # float64 [m, 1]
    num_candidates: int

    @classmethod
    def of(
        cls, places: list[int], rows: SequenceOf[SamplingRow], device: torch.device
    ) -> DrawGroup:
        """`places` is not empty; all are filtered, or none is."""
        params = [rows[place].sampling for place in places]
        top_k = [s.top_k for s in params]
        top_p = [s.top_p for s in params]
        min_p = [s.min_p for s in params]
        temperature = [max(s.temperature, _MIN_TEMPERATURE) for s in params]
        is_filtered = rows[places[0]].is_filtered
        return cls(
            places=np.array(places, np.int64),
            rows=torch.tensor(places, device=device),
            seeds=np.array([s.seed for s in params], np.uint64),
            temperature=_column(temperature, torch.float32, device),
            min_p=_column(min_p, torch.float32, device) if max(min_p) > 0.0 else None,
            top_k=_column(top_k, torch.int64, device) if is_filtered else None,
            top_p=_column(top_p, torch.float64, device) if is_filtered else None,
            num_candidates=min(MAX_CANDIDATES, max(top_k)) if min(top_k) > 0 else MAX_CANDIDATES,
        )


class SamplingPlan:
    """Everything about the rows of a batch that does not change from step to step."""

    def __init__(self, rows: list[SamplingRow], device: torch.device) -> None:
        self.rows = rows
        self.is_plain = all(row.is_plain for row in rows)
        random = [place for place, row in enumerate(rows) if not row.sampling.is_greedy]
        split = (
            [place for place in random if not rows[place].is_filtered],
            [place for place in random if rows[place].is_filtered],
        )
        self.groups = [DrawGroup.of(places, rows, device) for places in split if places]
        self.penalized = [place for place, row in enumerate(rows) if row.counts is not None]
        self.strengths = self._strengths().to(device)
        self.bias: TokenEdits | None = None
        if any(row.bias for row in rows):
            self.bias = TokenEdits(((i, row.bias) for i, row in enumerate(rows)), device)
        self.bannable = [place for place, row in enumerate(rows) if row.banned_token_ids]
        wanted = {
            place: row.sampling.num_logprobs
            for place, row in enumerate(rows)
            if row.sampling.num_logprobs is not None
        }
        self.logprob_places = list(wanted)
        self.logprob_rows = torch.tensor(self.logprob_places, dtype=torch.int64, device=device)
        self.num_wanted_logprobs = wanted
        self.num_top_logprobs = max(wanted.values(), default=0)

    def _strengths(self) -> torch.Tensor:
        """Float32 [3, penalized rows]: repetition, frequency, presence."""
        params = [self.rows[place].sampling for place in self.penalized]
        return torch.tensor(
            [
                [sampling.repetition_penalty for sampling in params],
                [sampling.frequency_penalty for sampling in params],
                [sampling.presence_penalty for sampling in params],
            ],
            dtype=torch.float32,
        )


def _column(
    values: list[int] | list[float], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=device).unsqueeze(1)
