"""When a sequence is over: an end token, a stop id, its own limit or the model's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.request import FinishReason

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

    from cluster.request import SamplingParams
    from engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Finish:
    """Why it is over. `stop_token_id` is the id that ended it, also its last token."""

    reason: FinishReason
    stop_token_id: int | None = None


_FULL = Finish(FinishReason.LENGTH)


def ending_token_ids(sampling: SamplingParams, eos_token_ids: AbstractSet[int]) -> frozenset[int]:
    """The ids that end a sequence with these parameters. Sampling bans the same ones while
    the sequence has fewer than `min_tokens`."""
    if sampling.ignore_eos:
        return frozenset(sampling.stop_token_ids)
    return frozenset(eos_token_ids).union(sampling.stop_token_ids)


def check_finished(
    sequence: Sequence, *, eos_token_ids: AbstractSet[int], max_model_len: int
) -> Finish | None:
    """Whether the token appended last ends the sequence. Changes nothing.

    An end token wins over a limit reached by the same token. `min_tokens` keeps end tokens
    from counting; it does not lift the limits.
    """
    sampling = sequence.sampling
    num_output_tokens = sequence.num_output_tokens
    if num_output_tokens >= sampling.min_tokens:
        token_id = sequence.token_ids[-1]
        is_end = token_id in eos_token_ids and not sampling.ignore_eos
        if is_end or token_id in sampling.stop_token_ids:
            return Finish(FinishReason.STOP, token_id)
    if num_output_tokens >= sampling.max_tokens or sequence.num_tokens >= max_model_len:
        return _FULL
    return None
