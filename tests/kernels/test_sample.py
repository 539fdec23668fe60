"""Tokens drawn by the kernels, against the line of tokens spelled out with Python's integers."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import kernels.sample
from kernels.draw import POWER
from kernels.sample import NO_TOKEN, DrawParams, SampleWorkspace, sample

if TYPE_CHECKING:
    from collections.abc import Sequence

Place = tuple[torch.device, torch.dtype]
LOG2_E = math.log2(math.e)


def params_of(rows: Sequence[dict[str, float]], device: torch.device) -> DrawParams:
    def column(name: str, default: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([row.get(name, default) for row in rows], dtype=dtype, device=device)

    return DrawParams(
        column("scale", LOG2_E, torch.float32),
        column("min_p", 0.0, torch.float32),
        column("top_p", 1.0, torch.float64),
        column("top_k", 0, torch.int32),
        torch.tensor([int(row.get("seed", 1)) for row in rows], device=device),
        torch.tensor([int(row.get("position", 1)) for row in rows], device=device),
    )


def draw(logits: torch.Tensor, rows: Sequence[dict[str, float]]) -> list[int]:
    """With scratch memory that holds whatever it held before."""
    num_rows, vocab_size = logits.shape
    workspace = SampleWorkspace(num_rows + 1, vocab_size, logits.device)
    for tensor in vars(workspace).values():
        tensor.fill_(77)
    out = torch.full((num_rows,), -99, dtype=torch.int64, device=logits.device)
    only_best = all(row.get("scale") == 0.0 for row in rows)
    params = params_of(rows, logits.device)
    sample(logits, params, out=out, workspace=workspace, only_best=only_best)
    if not only_best:
        return out.tolist()
    again = torch.full_like(out, -99)
    sample(logits, params, out=again, workspace=workspace)
    assert torch.equal(again, out)
    return out.tolist()


def expected(logits: torch.Tensor, row: dict[str, float]) -> int:
    """One row: float32 weights by numpy, everything after them by integers and sorted lists."""
    x = logits.float().cpu().numpy()
    best = x.max()
    if not math.isfinite(best):
        return NO_TOKEN
    scale = np.float32(row.get("scale", LOG2_E))
    if scale == 0.0:
        return int(x.argmax())
    exponent = np.maximum((x - best) * scale, np.float32(-126.0))
    whole = np.floor(exponent)
    part = exponent - whole
    power = np.zeros_like(part)
    for coefficient in POWER:
        power = (power + np.float32(coefficient)) * part
    weights = (power + np.float32(1.0)) * np.exp2(whole)
    weights[weights < np.float32(row.get("min_p", 0.0))] = 0.0
    lengths = [int(weight * 2.0**40) for weight in weights.astype(np.float64)]
    point = uniform(int(row.get("seed", 1)), int(row.get("position", 1)))
    top_k, top_p = int(row.get("top_k", 0)), row.get("top_p", 1.0)
    line = list(range(len(lengths)))
    if top_k or top_p < 1.0:
        line.sort(key=lambda token_id: (-weights[token_id], token_id))
    line = line[: top_k or None]
    ends = list(accumulate(lengths[token_id] for token_id in line))
    total = ends[-1]
    kept = total
    if top_p < 1.0:
        wanted = min(max(1, math.ceil(float(total) * top_p)), total)
        kept = next(end for end in ends if end >= wanted)
    target = int(point * float(kept))
    return next(token_id for token_id, end in zip(line, ends, strict=True) if end > target)


def uniform(seed: int, position: int) -> float:
    mask = 2**64 - 1

    def mix(bits: int) -> int:
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & mask
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & mask
        return bits ^ (bits >> 31)

    return (mix((mix(seed) + (position + 1) * 0x9E3779B97F4A7C15) & mask) >> 11) * 2.0**-53


KINDS: list[dict[str, float]] = [
    {"scale": 0.0},
    {},
    {"scale": 0.3},
    {"min_p": 0.1},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 10_000},
    {"top_p": 0.9},
    {"top_p": 0.999999},
    {"top_p": 1e-9},
    {"top_k": 300, "top_p": 0.8},
    {"top_k": 20, "top_p": 0.95, "min_p": 0.05},
    {"scale": 100.0, "top_p": 0.5},
    {"scale": 14427.0},
]


def assert_drawn(logits: torch.Tensor, rows: list[dict[str, float]]) -> None:
    drawn = draw(logits, rows)
    assert drawn == [expected(row, each) for row, each in zip(logits, rows, strict=True)]


def spread(rows: int, vocab_size: int, size: float) -> torch.Tensor:
    """Like a model's: most tokens alike, a few far above."""
    logits = torch.randn(rows, vocab_size) * size
    for row in logits:
        row[torch.randint(0, vocab_size, (20,))] += torch.rand(20) * 6 * size
    return logits


@pytest.mark.parametrize("size", [0.05, 1.0, 4.0])
def test_every_kind_of_row_draws_its_token(device_and_dtype: Place, size: float) -> None:
    device, dtype = device_and_dtype
    logits = spread(len(KINDS), 5000, size).to(device, dtype)
    rows = [{"seed": 1000 + i, "position": i * i, **kind} for i, kind in enumerate(KINDS)]
    assert_drawn(logits, rows)


@pytest.mark.parametrize("vocab_size", [2, 3, 2048, 2049])
def test_vocabularies_of_any_size(device: torch.device, vocab_size: int) -> None:
    logits = spread(len(KINDS), vocab_size, 1.0).to(device)
    assert_drawn(logits, [{"seed": 7 + i, **kind} for i, kind in enumerate(KINDS)])


def test_of_equal_weights_the_first_are_kept(device: torch.device) -> None:
    """Of a thousand equal tokens the point must find the right one by its id alone."""
    logits = torch.zeros(24, 3000, device=device)
    rows: list[dict[str, float]] = [
        {"seed": i, **({"top_k": 700} if i % 2 else {"top_p": 0.31})} for i in range(24)
    ]
    assert_drawn(logits, rows)
    assert max(draw(logits, rows)[1::2]) < 700


def test_a_list_that_is_too_short_is_not_used(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels.sample, "_LIST_SIZE", 32)
    logits = spread(len(KINDS), 4500, 0.2).to(device)
    assert_drawn(logits, [{"seed": 99 + i, **kind} for i, kind in enumerate(KINDS)])


def test_a_row_without_a_finite_best_has_no_token(device: torch.device) -> None:
    logits = spread(5, 2500, 1.0).to(device)
    logits[1, 2400] = math.nan
    logits[2, 3] = math.inf
    logits[3] = -math.inf
    for kind in KINDS:
        drawn = draw(logits, [{"seed": 5, **kind}] * 5)
        assert drawn[1:4] == [NO_TOKEN] * 3
        assert drawn[0] == expected(logits[0], {"seed": 5, **kind})
        assert drawn[4] == expected(logits[4], {"seed": 5, **kind})


def test_the_numbers_of_a_stream_are_those_of_the_host(device: torch.device) -> None:
    """Also for the largest seeds: they are not signed where they are mixed."""
    logits = torch.zeros(6, 4000, device=device)
    seeds = (0, 1, 2**31, 2**62 + 12345, 2**63 - 1, 987654321987654321)
    rows: list[dict[str, float]] = [
        {"seed": seed, "position": 131_071 * i} for i, seed in enumerate(seeds)
    ]
    assert_drawn(logits, rows)
