"""Which kernel computes attention to prompts on a GPU: what each can do, and which is best.

Measured on one NVIDIA H200, bfloat16, head size 128 (`python -m benchmarks.kernels
prefill_attention`): against cuDNN over contiguous keys and values, "gluon" is 1.2 times as fast for
one prompt of 2k tokens, 1.05 times for 8k, as fast for 32k and for 16 of 512; "triton" 0.65 times.
So Gluon is the choice wherever it runs, except where all chunks are shorter than half of its
pieces of 128 queries.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, get_args

import torch

from kernels.gluon_api import HAS_GLUON
from kernels.gluon_prefill import HEAD_SIZES

AttentionBackend: TypeAlias = Literal["gluon", "triton"]
# The fastest first; the last one does everything.
BACKENDS: tuple[AttentionBackend, ...] = get_args(AttentionBackend)

# Where the longest chunk has fewer queries, Triton's smaller tiles win.
GLUON_MIN_QUERIES = 65


class Facts(NamedTuple):
    """The compute capability of the GPU, the type and the head size of queries."""

    capability: tuple[int, int]
    dtype: torch.dtype
    head_size: int


def fastest(facts: Facts) -> AttentionBackend:
    """The best kernel that works."""
    return next(backend for backend in BACKENDS if not obstacles(backend, facts))


def obstacles(backend: AttentionBackend, facts: Facts) -> list[str]:
    """What a kernel needs and does not find; nothing if it works."""
    found: list[str] = []
    if backend == "triton":
        return found
    if not HAS_GLUON:
        found.append("a Triton with Gluon")
    if facts.capability[0] != 9:
        major, minor = facts.capability
        found.append(f"a GPU of compute capability 9.0 (this one has {major}.{minor})")
    if facts.dtype not in (torch.bfloat16, torch.float16):
        name = str(facts.dtype).removeprefix("torch.")
        found.append(f"a model in bfloat16 or float16 (this one is in {name})")
    if facts.head_size not in HEAD_SIZES:
        sizes = " or ".join(map(str, HEAD_SIZES))
        found.append(f"heads of {sizes} (these have {facts.head_size})")
    return found
