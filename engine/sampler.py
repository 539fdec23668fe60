"""Next tokens from logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from cluster.errors import InternalError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Sequence as SequenceOf

    from cluster.errors import ServingError
    from cluster.request import TokenLogprobs
    from engine.sequence import Sequence


class SampledToken(NamedTuple):
    """One row's outcome. With an `error` there is no token: `token_id` is -1, and the
    sequence ends with that error while its neighbours go on."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    error: ServingError | None = None


class Sampler:
    """Draws one token for each row of logits."""

    def __init__(
        self, vocab_size: int, device: torch.device, *, eos_token_ids: Iterable[int] = ()
    ) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._eos_token_ids = frozenset(eos_token_ids)

    def sample(self, logits: torch.Tensor, sequences: SequenceOf[Sequence]) -> list[SampledToken]:
        """`logits` [n, vocab] float, row i for `sequences[i]`, whose `token_ids` do not hold
        the new token yet. Does not change `logits` or the sequences' tokens. Reads the device
        once."""
        best, token_ids = logits.float().max(dim=-1)
        token_ids = torch.where(best.isfinite(), token_ids, -1)
        return [
            SampledToken(token_id) if token_id >= 0 else _failed()
            for token_id in token_ids.tolist()
        ]


def _failed() -> SampledToken:
    return SampledToken(-1, error=InternalError("The model gave no usable logits."))
