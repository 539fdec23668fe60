"""What sampler tests share: a row of sampling written down plainly, with Python's floats."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from engine.sampler import Sampler
from kernels.randomness import uniforms

if TYPE_CHECKING:
    from engine.sequence import Sequence

EOS = 3
VOCAB = 50
CPU = torch.device("cpu")


def reference(logits: torch.Tensor, sequence: Sequence, eos: int = EOS) -> int:
    """One row, written down plainly: Python floats, sorted lists, exact sums."""
    sampling = sequence.sampling
    row = logits.float().tolist()
    output = sequence.output_token_ids
    for token_id in set(sequence.token_ids):
        penalty = sampling.repetition_penalty
        row[token_id] = row[token_id] / penalty if row[token_id] > 0 else row[token_id] * penalty
    for token_id in set(output):
        row[token_id] -= sampling.frequency_penalty * output.count(token_id)
        row[token_id] -= sampling.presence_penalty
    for token_id, bias in dict(sampling.logit_bias).items():
        row[token_id] += bias
    if len(output) < sampling.min_tokens:
        for token_id in {*sampling.stop_token_ids, *(() if sampling.ignore_eos else (eos,))}:
            row[token_id] = -math.inf
    best = max(row)
    if sampling.is_greedy:
        return row.index(best)
    weights = [math.exp((logit - best) / sampling.temperature) for logit in row]
    weights = [weight if weight >= sampling.min_p else 0.0 for weight in weights]
    line = sorted(range(len(row)), key=lambda token_id: (-weights[token_id], token_id))
    if sampling.top_k == 0 and sampling.top_p == 1.0:
        line = list(range(len(row)))
    line = line[: sampling.top_k or len(line)]
    total, kept, mass = math.fsum(weights[token_id] for token_id in line), [], 0.0
    for token_id in line:
        kept.append(token_id)
        mass += weights[token_id]
        if mass >= sampling.top_p * total * (1 - 1e-9):
            break
    point = draw_point(sequence) * mass
    for token_id in kept:
        point -= weights[token_id]
        if point < 0:
            return token_id
    return kept[-1]


def draw_point(sequence: Sequence) -> float:
    seeds = np.array([sequence.sampling.seed], np.uint64)
    return float(uniforms(seeds, np.array([sequence.num_tokens], np.uint64))[0])


def make_sampler(vocab_size: int = VOCAB, device: torch.device = CPU) -> Sampler:
    return Sampler(vocab_size, device, eos_token_ids=[EOS], max_rows=4096)


def random_logits(rows: int, vocab_size: int = VOCAB, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab_size, generator=generator) * 3
