"""The parameters of a batch's rows as arrays, built when the batch changes.

Life of a row's parameters
    1. `SamplingRow`: made when its sequence is sampled first, kept on the sequence.
    2. `SamplingPlan`: made from the rows of a batch, kept as long as the next batch has the
       same rows in the same order, which while decoding is most steps.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from engine.penalties import TokenCounts, TokenEdits, TokenValues, to_device

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf
    from collections.abc import Set as AbstractSet

    import torch

    from cluster.request import SamplingParams

_MIN_TEMPERATURE = 1e-4  # below, weights of two tokens differ by more than float32 can hold


class SamplingRow:
    """What the sampler keeps of one sequence. Compared by identity."""

    __slots__ = ("bans", "bias", "counts", "sampling")

    def __init__(
        self,
        sampling: SamplingParams,
        token_ids: SequenceOf[int],
        num_prompt_tokens: int,
        *,
        vocab_size: int,
        eos_token_ids: AbstractSet[int],
    ) -> None:
        self.sampling = sampling
        known = range(vocab_size)
        self.bias = TokenValues.of(pair for pair in sampling.logit_bias if pair[0] in known)
        self.bans: TokenValues | None = None  # until there are `min_tokens`
        if sampling.min_tokens > 0:
            ending = sorted(ending_token_ids(sampling, eos_token_ids))
            self.bans = TokenValues.of((each, -math.inf) for each in ending if each in known)
        self.counts: TokenCounts | None = None
        repeats = sampling.repetition_penalty != 1.0
        if repeats or sampling.frequency_penalty or sampling.presence_penalty:
            self.counts = TokenCounts(token_ids, num_prompt_tokens, includes_prompt=repeats)

    @property
    def scale(self) -> float:
        """What logits are multiplied by before they are powers of two; 0 takes the best."""
        if self.sampling.is_greedy:
            return 0.0
        return math.log2(math.e) / max(self.sampling.temperature, _MIN_TEMPERATURE)


class SamplingPlan:
    """Everything about the rows of a batch that does not change from step to step."""

    def __init__(self, rows: list[SamplingRow], device: torch.device) -> None:
        self.rows = rows
        params = [row.sampling for row in rows]
        self.scale = np.array([row.scale for row in rows], np.float32)
        self.only_best = not self.scale.any()
        self.min_p = np.array([sampling.min_p for sampling in params], np.float32)
        self.top_p = np.array([sampling.top_p for sampling in params], np.float64)
        self.top_k = np.array([sampling.top_k for sampling in params], np.int32)
        self.seeds = np.array([sampling.seed for sampling in params], np.int64)
        self.penalized = [place for place, row in enumerate(rows) if row.counts is not None]
        self.penalized_rows = to_device(np.array(self.penalized, np.int64), device)
        self.strengths = to_device(self._strengths(), device)
        biased = {place: row.bias for place, row in enumerate(rows) if row.bias is not None}
        self.bias = TokenEdits(biased, device) if biased else None
        self.bannable = {place: row.bans for place, row in enumerate(rows) if row.bans is not None}
        wanted = {
            place: row.sampling.num_logprobs
            for place, row in enumerate(rows)
            if row.sampling.num_logprobs is not None
        }
        self.logprob_rows = to_device(np.array(list(wanted), np.int64), device)
        self.num_wanted_logprobs = wanted
        self.num_top_logprobs = max(wanted.values(), default=0)

    @property
    def needs_logits(self) -> bool:
        """Whether a step may have to look at the logits besides drawing from them."""
        return bool(self.penalized or self.bias or self.bannable or self.num_wanted_logprobs)

    def _strengths(self) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        """Float32 [3, penalized rows]: repetition, frequency, presence."""
        params = [self.rows[place].sampling for place in self.penalized]
        return np.array(
            [
                [sampling.repetition_penalty for sampling in params],
                [sampling.frequency_penalty for sampling in params],
                [sampling.presence_penalty for sampling in params],
            ],
            np.float32,
        )


def ending_token_ids(sampling: SamplingParams, eos_token_ids: AbstractSet[int]) -> frozenset[int]:
    """The ids that end a sequence with these parameters. Sampling bans the same ones while
    the sequence has fewer than `min_tokens`."""
    if sampling.ignore_eos:
        return frozenset(sampling.stop_token_ids)
    return frozenset(eos_token_ids).union(sampling.stop_token_ids)
