"""The finalizer of splitmix64 (Steele, Lea, Flood 2014): bijective on 64 bits, and each bit that
goes in changes each bit that comes out with chance 1/2. On the host and in kernels, bit for bit
alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kernels.dispatch import jit, tl

if TYPE_CHECKING:
    from numpy.typing import NDArray

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # the step from one state to the next
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))


def finalize(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    bits = (bits ^ (bits >> _SHIFTS[0])) * _FACTORS[0]
    bits = (bits ^ (bits >> _SHIFTS[1])) * _FACTORS[1]
    return bits ^ (bits >> _SHIFTS[2])


@jit
def finalized(bits: tl.tensor) -> tl.tensor:
    """The same of uint64 in a kernel."""
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    return bits ^ (bits >> 31)
