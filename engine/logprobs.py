"""Log-probabilities of the model's own distribution, before any parameter touched it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cluster.request import TokenLogprobs
from kernels.draw import heaviest

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def logprob_table(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> torch.Tensor:
    """Float64 [n, 1 + 2 * num_top]: the log-probability of `token_ids` [n], then the
    `num_top` most likely ids, then their log-probabilities. `logits` float32 [n, vocab]."""
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, token_ids.unsqueeze(1)).double()
    if num_top == 0:
        return chosen
    top_ids = heaviest(logits, num_top)
    return torch.cat([chosen, top_ids.double(), logprobs.gather(1, top_ids).double()], dim=1)


def read_logprobs(line: npt.NDArray[np.float64], num_top: int, num_wanted: int) -> TokenLogprobs:
    """One line of the table, with the `num_wanted` <= `num_top` most likely tokens."""
    top_ids = line[1 : 1 + num_wanted].astype(int).tolist()
    top_logprobs = line[1 + num_top : 1 + num_top + num_wanted].tolist()
    return TokenLogprobs(float(line[0]), tuple(zip(top_ids, top_logprobs, strict=True)))
