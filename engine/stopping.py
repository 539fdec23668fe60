"""When a sequence is over: an end token, a stop id, its own limit or the model's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.request import FinishReason

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

    from engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Finish:
    """Why it is over. `stop_token_id` is the id that ended it, also its last token."""

    reason: FinishReason
    stop_token_id: int | None = None


_FULL = Finish(FinishReason.LENGTH)


def check_finished(
    sequence: Sequence, *, eos_token_ids: AbstractSet[int], max_model_len: int
) -> Finish | None:
    """Whether the token appended last ends the sequence. Changes nothing.

    An end token wins over a limit reached by the same token. `min_tokens` keeps end tokens
    from counting; it does not lift the limits.
    """
    sampling = sequence.request.sampling
    token_id = sequence.token_ids[-1]
    num_tokens = len(sequence.token_ids)
    if token_id in eos_token_ids or token_id in sampling.stop_token_ids:
        is_end = not sampling.ignore_eos or token_id in sampling.stop_token_ids
        if is_end and num_tokens - sequence.num_prompt_tokens >= sampling.min_tokens:
            return Finish(FinishReason.STOP, token_id)
    if is_full(sequence, num_tokens, max_model_len):
        return _FULL
    return None


def is_full(sequence: Sequence, num_tokens: int, max_model_len: int) -> bool:
    """Whether it ends with so many tokens, whatever they are: no step must go further."""
    num_output_tokens = num_tokens - sequence.num_prompt_tokens
    return num_output_tokens >= sequence.request.sampling.max_tokens or num_tokens >= max_model_len
