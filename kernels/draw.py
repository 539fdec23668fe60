"""A token from a row of logits and one random number, the same in every batch.

Float sums depend on the order of their terms, and that on the shape of the batch. So weights
exp((logit - best) / temperature), at most 1, become integers; sums of integers are exact. A row
is then a line of tokens in a fixed order, each as long as its weight, and the random number is
a point on that line (inverse CDF). Filters are prefixes of the line sorted by weight, equal
weights by token id.

This is what `sample.py` computes on a CPU, and what its kernels must equal bit for bit.
"""

from __future__ import annotations

import torch

# 2**x for x in [0, 1) as a polynomial in x, highest power first, without its constant 1: least
# squares weighted until the largest relative error is smallest, 2e-7 with the rounding.
POWER = (
    0.0018671300495043397,
    0.009017030708491802,
    0.05579991266131401,
    0.24016444385051727,
    0.6931512951850891,
)
MIN_EXPONENT = -126.0  # of a float32; such a weight has no length

_ONE = 1 << 40  # the weight of the best token: 2**18 tokens of it stay far below 2**63
_LOW_BITS = 32
_LOW_MASK = (1 << _LOW_BITS) - 1
_SIGN_SHIFT, _MAGNITUDE = 31, 0x7FFFFFFF


def token_weights(
    logits: torch.Tensor, best: torch.Tensor, scale: torch.Tensor, min_p: torch.Tensor | None
) -> torch.Tensor:
    """Float32 weights [n, vocab] in [0, 1]: 1 for the best token, 0 below `min_p`.

    `logits` float32 [n, vocab]; `best` its row maxima, `scale` = log2(e) / temperature and `min_p`
    float32 [n, 1]. Weights are powers of two by a polynomial of rounded products and sums, so
    they have the same bits wherever they are computed.
    """
    exponent = (logits - best).mul_(scale).clamp_(min=MIN_EXPONENT)
    whole = exponent.floor()
    part = exponent.sub_(whole)
    weights = part * POWER[0]
    for coefficient in POWER[1:]:
        weights.add_(coefficient).mul_(part)
    weights.add_(1.0)
    weights.mul_(whole.int().add_(127).bitwise_left_shift_(23).view(torch.float32))
    if min_p is not None:
        weights.masked_fill_(weights < min_p, 0.0)
    return weights


def draw_any(weights: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Token ids [n] by weight alone. `points` float64 [n, 1] in [0, 1)."""
    line = _lengths(weights).cumsum(dim=-1)
    return _pick(line, line[:, -1:], points).squeeze(1)


def draw_filtered(
    weights: torch.Tensor,
    points: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    num_candidates: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [n] among the `top_k` heaviest (int64 [n, 1], 0: all), then among the heaviest
    that make up `top_p` (float64 [n, 1]) of what is left.

    Looks at the heaviest `num_candidates` tokens only. Also returns bool [n]: whether they
    were enough. They always are when they are the vocabulary; where enough, more change
    nothing.
    """
    num_candidates = min(num_candidates, weights.shape[-1])
    token_ids = heaviest(weights, num_candidates)
    lengths = _lengths(weights)
    line = lengths.gather(1, token_ids).cumsum(dim=-1)
    at_k = line.gather(1, (top_k - 1).clamp(0, num_candidates - 1))
    total = torch.where(top_k > 0, at_k, lengths.sum(dim=-1, keepdim=True))
    nucleus = (total.double() * top_p).ceil().long().clamp(min=1)
    nucleus = torch.where(top_p < 1.0, nucleus, total)
    last = torch.searchsorted(line, torch.minimum(nucleus, total))
    is_enough = last < num_candidates
    if num_candidates < weights.shape[-1]:
        is_enough &= top_k <= num_candidates
    kept = line.gather(1, last.clamp(max=num_candidates - 1))
    rank = _pick(line, kept, points)
    return token_ids.gather(1, rank).squeeze(1), is_enough.squeeze(1)


def heaviest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Ids [n, count] of the largest float32 `values` [n, vocab], largest first, equals by id.

    One int64 key holds the value's rank and the id, so no two are equal and every algorithm
    gives the same answer.
    """
    bits = values.contiguous().view(torch.int32)
    rank = bits ^ ((bits >> _SIGN_SHIFT) & _MAGNITUDE)  # orders like the floats
    vocab_size = values.shape[-1]
    ids = torch.arange(vocab_size, device=values.device)
    keys = (rank.long() << _LOW_BITS) | (_LOW_MASK - ids)
    if count < vocab_size:
        best = keys.topk(count).values
    else:
        best = keys.sort(dim=-1, descending=True).values
    return _LOW_MASK - (best & _LOW_MASK)


def _lengths(weights: torch.Tensor) -> torch.Tensor:
    return (weights * _ONE).long()  # exact: a power of two


def _pick(line: torch.Tensor, end: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Index [n, 1] of the token under each point of the line up to `end`.

    A point is at most 1 - 2**-53, so its product with `end` stays below `end`, rounded or not.
    """
    targets = (points * end.double()).long()
    picked = torch.searchsorted(line, targets, right=True)
    return picked.clamp_(max=line.shape[-1] - 1)  # a row that is not a number has no end
