"""Digests of KV blocks, by which a receiver knows that a block arrived as it was sent.

The digest of a unit of bytes is Σ aᵢ·xᵢ mod 2⁶⁴ over its little-endian 32-bit words xᵢ, with fixed
odd 64-bit multipliers aᵢ: the multiply-shift family of Dietzfelbinger (1996). A change of one word
always changes it, because an odd multiplier is invertible; any other change, words swapped or
dropped included, escapes with a probability of about 2⁻³². It guards against faults, not forgers.

The multipliers are part of the wire format: aᵢ is output i of splitmix64 with seed
`_MULTIPLIER_SEED`, its lowest bit set. The sum does not depend on the order of its terms, so the
GPU's and the CPU's are equal bit for bit.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from kernels.dispatch import jit_for_any, num_multiprocessors, runs_triton, tl
from kernels.splitmix import GOLDEN, finalize

_MULTIPLIER_SEED = 0x42_41_54_4F_4E  # "BATON"

# Words that one program multiplies; their multipliers stay in its registers over many units.
_CHUNK_WORDS = 2048
# Bytes that the reference widens to 64 bits at a time: the copy stays in the second-level cache.
_REFERENCE_STEP_BYTES = 1 << 20


def block_digests(data: torch.Tensor, num_units: int) -> torch.Tensor:
    """Digests of the `num_units` equal units that lie one after the other in `data`.

    data: uint8, contiguous, 4-byte aligned, of any shape; its size is num_units * unit_bytes with
    unit_bytes a multiple of 4. Returns int64 `[num_units]` on data's device.
    """
    assert data.dtype == torch.uint8
    assert data.is_contiguous()
    if num_units == 0:
        return torch.empty(0, dtype=torch.int64, device=data.device)
    assert data.numel() % (4 * num_units) == 0
    words = data.view(-1).view(torch.int32).view(num_units, -1)
    multipliers = multipliers_of(words.shape[1], data.device)
    if runs_triton(data):
        return _block_digests_triton(words, multipliers)
    return _block_digests_reference(words, multipliers)


@lru_cache(maxsize=16)
def multipliers_of(num_words: int, device: torch.device) -> torch.Tensor:
    """The first `num_words` multipliers, as int64."""
    with np.errstate(over="ignore"):
        steps = np.arange(1, num_words + 1, dtype=np.uint64) * GOLDEN
        multipliers = finalize(steps + np.uint64(_MULTIPLIER_SEED)) | np.uint64(1)
    return torch.from_numpy(multipliers.view(np.int64)).to(device)


def _block_digests_reference(words: torch.Tensor, multipliers: torch.Tensor) -> torch.Tensor:
    num_units, num_words = words.shape
    digests = torch.empty(num_units, dtype=torch.int64)
    step = max(1, _REFERENCE_STEP_BYTES // (4 * max(1, num_words)))
    unsigned = words.view(torch.uint32)
    for start in range(0, num_units, step):
        stop = start + step
        torch.mv(unsigned[start:stop].to(torch.int64), multipliers, out=digests[start:stop])
    return digests


def _block_digests_triton(words: torch.Tensor, multipliers: torch.Tensor) -> torch.Tensor:
    num_units, num_words = words.shape
    digests = torch.zeros(num_units, dtype=torch.int64, device=words.device)
    chunks = -(-num_words // _CHUNK_WORDS)
    # About eight programs per multiprocessor, each over as many units as that leaves it.
    units_per_program = max(1, num_units * chunks // (8 * num_multiprocessors(words.device)))
    _digest_kernel[(chunks * -(-num_units // units_per_program),)](
        words, multipliers, digests, num_units, chunks, units_per_program,
        WORDS=num_words, BLOCK=_CHUNK_WORDS, num_warps=4,
    )  # fmt: skip
    return digests


@jit_for_any("num_units", "units_per_program")
def _digest_kernel(
    words_ptr: tl.tensor, multipliers_ptr: tl.tensor, digests_ptr: tl.tensor, num_units: tl.tensor,
    chunks: tl.tensor, units_per_program: tl.tensor, WORDS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    program = tl.program_id(0)
    column = program % chunks * BLOCK + tl.arange(0, BLOCK)
    mask = column < WORDS
    multipliers = tl.load(multipliers_ptr + column, mask=mask, other=0)
    first_unit = program // chunks * units_per_program
    for unit in range(first_unit, tl.minimum(first_unit + units_per_program, num_units)):
        words = tl.load(words_ptr + tl.cast(unit, tl.int64) * WORDS + column, mask=mask, other=0)
        unsigned = words.to(tl.int64) & 0xFFFFFFFF
        tl.atomic_add(digests_ptr + unit, tl.sum(unsigned * multipliers, axis=0), sem="relaxed")
