"""Digests of KV blocks between two pools in host memory: XXH3 of each unit, 64 bits.

A processor multiplies 64-bit integers slowly from Python, so the digest that every device can take
(`block_digest.py`) would cost as much there as the wire does. XXH3 runs at the speed of memory. It
has no kernel for GPUs: nodes agree on it when they pair, where both pools are in host memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

try:
    import xxhash
except ImportError:  # nodes then take the digest of block_digest.py
    xxhash = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from numpy.typing import NDArray


def has_host_digests() -> bool:
    """Whether the package that computes them is installed."""
    return xxhash is not None


def host_digests(data: torch.Tensor, num_units: int) -> NDArray[np.uint64]:
    """Digests of the `num_units` equal units that lie one after the other in `data`.

    data: uint8, contiguous, in host memory. Returns uint64 `[num_units]`.
    """
    assert data.device.type == "cpu"
    assert data.is_contiguous()
    if num_units == 0:
        return np.empty(0, dtype=np.uint64)
    assert data.numel() % num_units == 0
    return np.array(digests_of_pieces(list(data.view(num_units, -1).numpy())), dtype=np.uint64)


def digests_of_pieces(units: Sequence[NDArray[np.uint8]]) -> list[int]:
    """The same of units that lie anywhere: contiguous buffers."""
    digest: Callable[[Any], int] = xxhash.xxh3_64_intdigest  # arrays are buffers
    return [digest(unit) for unit in units]
