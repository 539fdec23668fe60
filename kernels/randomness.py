"""Random numbers that depend on a sequence's seed and the position of its token, on nothing else.

There is no generator state to keep, copy or lose: a sequence that is retried, migrated or
computed again draws the same numbers, in any batch, on any node.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kernels.splitmix import GOLDEN, finalize

if TYPE_CHECKING:
    import numpy.typing as npt

_UNUSED_BITS = np.uint64(11)
_ULP = 2.0**-53


def uniforms(
    seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.uint64]
) -> npt.NDArray[np.float64]:
    """[n] numbers in [0, 1) for [n] seeds and [n] positions.

    SplitMix64 read at an index: the state of seed s starts at mix(s), so the streams of
    neighbouring seeds are unrelated, and is advanced `position` + 1 times at once.
    """
    state = finalize(seeds) + (positions + np.uint64(1)) * GOLDEN
    return (finalize(state) >> _UNUSED_BITS).astype(np.float64) * _ULP
