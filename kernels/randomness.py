"""Random numbers that depend on a sequence's seed and the position of its token, on nothing else.

There is no generator state to keep, copy or lose: a sequence that is retried, migrated or
computed again draws the same numbers, in any batch, on any node.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

_WEYL = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_SHIFT_30, _SHIFT_27, _SHIFT_31 = np.uint64(30), np.uint64(27), np.uint64(31)
_UNUSED_BITS = np.uint64(11)
_ULP = 2.0**-53


def uniforms(
    seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.uint64]
) -> npt.NDArray[np.float64]:
    """[n] numbers in [0, 1) for [n] seeds and [n] positions.

    SplitMix64 read at an index: the state of seed s starts at mix(s), so the streams of
    neighbouring seeds are unrelated, and is advanced `position` + 1 times at once.
    """
    state = _mix(seeds) + (positions + np.uint64(1)) * _WEYL
    return (_mix(state) >> _UNUSED_BITS).astype(np.float64) * _ULP


def _mix(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finalizer: each input bit changes each output bit with chance 1/2."""
    bits = (bits ^ (bits >> _SHIFT_30)) * _MIX_1
    bits = (bits ^ (bits >> _SHIFT_27)) * _MIX_2
    return bits ^ (bits >> _SHIFT_31)
