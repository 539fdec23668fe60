"""One token for each row of logits, without the host, the same in every batch and on every device.

What is computed is `draw.py`'s line of tokens; here is how, on a GPU. A row is cut into tiles.

1. `best_kernel`: each tile's best logit and its first id; infinite where one is not a number.
2. `weigh_kernel` (rows with a temperature): each tile's sum of integer weights; for filtered rows
   also the sums and numbers of weights in bins, sixteen for each octave below the best.
3. `plan_kernel` (filtered rows): in which bins the thresholds of top-k and top-p lie and in
   which the random point falls. Sums of bins tell it exactly or within one or two.
4. `collect_kernel` (filtered rows): the tokens of these bins go to a list, in any order. If they
   are too many, the list is not used.
5. `draw_kernel`: the best token, or the tile and then the token under the row's random point. In
   a filtered row the thresholds, then the weight under the point, are searched by bisection over
   the bits of the weight, nine parts at a time, in the list or, without one, in the whole row; of
   equal weights the id decides.

Sums of integers are exact in any order, so the order in which tiles come is nowhere to be seen.
All grids follow from shapes and nothing is read back, so the whole is captured in a graph.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from kernels.dispatch import next_power_of_two, runs_triton
from kernels.draw import draw_any, draw_filtered, token_weights
from kernels.randomness import uniforms
from kernels.sample_draw import draw_kernel
from kernels.sample_rows import best_kernel, collect_kernel, plan_kernel, weigh_kernel

NO_TOKEN = -1
MAX_CANDIDATES = 1024  # on the CPU a filtered draw looks at more tokens only if these do not do
_TILE = 2048
_LEAST_TILES = 16  # no compiler is tried with vectors of one element
_NUM_BINS = 1024  # 0 begins with the weight 1; those deeper than 41 octaves stay empty
_LIST_SIZE = 16384
# Of each stage (top-k, top-p, point): first bin, last bin, sum before the first; then, for top-k,
# the number before it.
_PLAN_SIZE = 10
_MAX_ELEMENTS = 1 << 24  # CPU: logits drawn from at once, bounds the workspace to about 0.5 GB


class DrawParams(NamedTuple):
    """How each of n rows is drawn: tensors [n] beside the logits. Rows are independent."""

    scale: torch.Tensor  # float32, log2(e) / temperature; 0: take the best token
    min_p: torch.Tensor  # float32
    top_p: torch.Tensor  # float64, 1: off
    top_k: torch.Tensor  # int32, 0: off
    seeds: torch.Tensor  # int64, not negative
    positions: torch.Tensor  # int64, the index that the new token takes


class SampleWorkspace:
    """Scratch memory of the kernels for up to `max_rows` rows; one launch at a time uses it."""

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device) -> None:
        num_tiles = -(-vocab_size // _TILE)

        def empty(width: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(max_rows, width, dtype=dtype, device=device)

        self.best = empty(num_tiles, torch.float32)
        self.best_ids = empty(num_tiles, torch.int32)
        self.totals = empty(num_tiles, torch.int64)
        self.bin_sums = empty(_NUM_BINS, torch.int64)
        self.bin_counts = empty(_NUM_BINS, torch.int32)
        self.plan = empty(_PLAN_SIZE, torch.int64)
        self.num_listed = empty(1, torch.int32)
        self.listed_bits = empty(_LIST_SIZE, torch.int32)
        self.listed_ids = empty(_LIST_SIZE, torch.int32)


def sample(
    logits: torch.Tensor,
    params: DrawParams,
    *,
    out: torch.Tensor,
    workspace: SampleWorkspace | None = None,
    only_best: bool = False,
) -> torch.Tensor:
    """Token ids into `out` int64 [n]: of row i of `logits` [n, vocab], any float type, contiguous,
    of at least two tokens.

    A row whose best logit is no finite number gets `NO_TOKEN`. On a GPU `workspace` of at least n
    rows is needed. `only_best`: no row has a temperature, which saves the launches for those that
    have. Returns `out`.
    """
    if runs_triton(logits):
        assert workspace is not None
        _sample_triton(logits, params, out, workspace, only_best)
    else:
        _sample_reference(logits.float(), params, out, only_best)
    return out


def best_tokens(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row maxima of float32 CPU logits and their first ids; a row with a NaN has NaN."""
    # Ten times faster than torch, which does not vectorise this on a CPU.
    array = logits.numpy()
    ids = array.argmax(axis=-1)
    return torch.from_numpy(array[np.arange(len(ids)), ids]), torch.from_numpy(ids)


def _sample_reference(
    logits: torch.Tensor, params: DrawParams, out: torch.Tensor, only_best: bool
) -> None:
    best, token_ids = best_tokens(logits)
    out.copy_(token_ids)
    if not only_best:
        drawn = params.scale.nonzero().flatten()
        is_filtered = (params.top_k[drawn] > 0) | (params.top_p[drawn] < 1.0)
        for rows, filters in ((drawn[~is_filtered], False), (drawn[is_filtered], True)):
            for part in torch.split(rows, max(1, _MAX_ELEMENTS // logits.shape[-1])):
                if len(part):
                    out[part] = _draw_rows(logits, best, params, part, filters)
    out.masked_fill_(~best.isfinite(), NO_TOKEN)


def _draw_rows(
    logits: torch.Tensor, best: torch.Tensor, params: DrawParams, rows: torch.Tensor, filters: bool
) -> torch.Tensor:
    """Token ids of these rows, all filtered or none."""
    scale, min_p, top_p, top_k, seeds, positions = (each[rows].unsqueeze(1) for each in params)
    points = uniforms(seeds.numpy().view(np.uint64), positions.numpy().view(np.uint64))
    point = torch.from_numpy(points)
    of_rows = logits if len(rows) == len(logits) else logits[rows]
    thresholds = min_p if float(min_p.max()) > 0.0 else None
    weights = token_weights(of_rows, best[rows].unsqueeze(1), scale, thresholds)
    if not filters:
        return draw_any(weights, point)
    most = int(top_k.max()) if int(top_k.min()) > 0 else MAX_CANDIDATES
    top_k = top_k.long()
    token_ids, is_enough = draw_filtered(weights, point, top_k, top_p, min(MAX_CANDIDATES, most))
    lacking = (~is_enough).nonzero().flatten()
    if len(lacking):
        token_ids[lacking], _ = draw_filtered(
            weights[lacking], point[lacking], top_k[lacking], top_p[lacking], weights.shape[-1]
        )
    return token_ids


# ---- Triton --------------------------------------------------------------------------------


def _sample_triton(
    logits: torch.Tensor,
    params: DrawParams,
    out: torch.Tensor,
    work: SampleWorkspace,
    only_best: bool,
) -> None:
    num_rows, vocab_size = logits.shape
    assert logits.is_contiguous()
    num_tiles = work.best.shape[1]
    assert num_rows <= len(work.best)
    assert num_tiles == -(-vocab_size // _TILE)
    if num_rows == 0:
        return
    grid = (num_rows, num_tiles)
    sizes = {
        "VOCAB": vocab_size,
        "TILE": _TILE,
        "TILES": num_tiles,
        "TILES_PADDED": max(_LEAST_TILES, next_power_of_two(num_tiles)),
        "BINS": _NUM_BINS,
        # A fused product and sum would round once where the reference rounds twice.
        "enable_fp_fusion": False,
    }
    scale, min_p, top_p, top_k, seeds, positions = params
    filters = (scale, min_p, top_p, top_k)
    bins = (work.bin_sums, work.bin_counts)
    listed = (work.num_listed, work.listed_bits, work.listed_ids)
    best_kernel[grid](
        logits, *filters, work.best, work.best_ids, *bins, work.num_listed, **sizes, num_warps=4
    )
    if not only_best:
        weigh_kernel[grid](logits, *filters, work.best, work.totals, *bins, **sizes, num_warps=8)
        plan_kernel[(num_rows,)](
            *filters, seeds, positions, work.best, work.totals, *bins, work.plan,
            **sizes, PLAN=_PLAN_SIZE, num_warps=4,
        )  # fmt: skip
        collect_kernel[grid](
            logits, *filters, work.best, work.plan, *listed,
            **sizes, PLAN=_PLAN_SIZE, LIST=_LIST_SIZE, num_warps=8,
        )  # fmt: skip
    draw_kernel[(num_rows,)](
        logits, *filters, seeds, positions, work.best, work.best_ids, work.totals,
        work.bin_counts, work.plan, *listed, out,
        **sizes, PLAN=_PLAN_SIZE, LIST=_LIST_SIZE, BLOCK=1024, WAYS=8, num_warps=8,
    )  # fmt: skip
