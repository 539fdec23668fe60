"""Seals the digests of units for their places, and compares them, where the units are.

    place   64 bits of (seed, layer, position): m(m(seed ^ layer * L) ^ position * P), m one step of
            splitmix64, L and P odd
    sealed  the unit's digest plus its place, mod 2^64

Both are part of the wire format. For a fixed place sealing is a bijection; for fixed bytes another
place gives another value but for a probability of 2^-64. Sealed digests lie behind the units of a
slot, and travel with them, so that no digest passes through the host on a device: what it reads is
a `Verdict`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from kernels.dispatch import jit, tl
from kernels.splitmix import GOLDEN, finalize, finalized

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Of units of one move; more programs than a GPU has multiprocessors need no more.
MAX_STRETCHES = 1024
_LAYER = np.uint64(0xA0761D6478BD642F)
_POSITION = np.uint64(0xD6E8FEB86659FD93)


def places_of(
    seed: int, layers: NDArray[np.uint64], positions: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """The 64 bits of each place; `layers` and `positions` broadcast."""
    return _mix(_mix(np.uint64(seed) ^ (layers * _LAYER)) ^ (positions * _POSITION))


def _mix(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One step of splitmix64 from this state: 0 does not stay 0."""
    return finalize(bits + GOLDEN)


class Places(NamedTuple):
    """Of a frame's units, layer by layer. `seed`: 63 bits. `positions`: int64, of which
    `num_positions` from `first` on count, on the device of the digests."""

    seed: int
    layer_start: int
    num_layers: int
    positions: torch.Tensor
    num_positions: int
    first: int = 0

    @property
    def num_units(self) -> int:
        return self.num_layers * self.num_positions

    def of(self, numbers: torch.Tensor) -> torch.Tensor:
        """What counts in a list like `positions`."""
        return numbers[self.first : self.first + self.num_positions]


class Sums:
    """Digests of one move at a time, while its programs add to them; all zero between two moves.

    `digests`: int64 `[max_units]`, of the units. `num_added`: int32 `[MAX_STRETCHES]`, for each
    stretch of units that the same programs work on, how many of these have added their part.
    """

    __slots__ = ("digests", "num_added")

    def __init__(self, max_units: int, device: torch.device) -> None:
        self.digests = torch.zeros(max_units, dtype=torch.int64, device=device)
        self.num_added = torch.zeros(MAX_STRETCHES, dtype=torch.int32, device=device)


class Verdict:
    """Of one comparison at a time, in host memory that the device writes to. A comparison that
    never ran, or only in part, has not verified anything.

    `num_right`: int32 `[MAX_STRETCHES]`, the units of each stretch that were found right.
    """

    __slots__ = ("_view", "num_right")

    def __init__(self, *, is_pinned: bool) -> None:
        self.num_right = torch.zeros(MAX_STRETCHES, dtype=torch.int32, pin_memory=is_pinned)
        self._view = self.num_right.numpy()

    def reset(self) -> None:
        """Nothing is verified. Before a comparison is launched, after the last one has ended."""
        self._view.fill(0)

    def has_verified(self, num_units: int) -> bool:
        """Whether so many units, those of the whole comparison, were right. Once it has ended."""
        return int(self._view.sum()) == num_units


def seal_on_host(digests: torch.Tensor, places: Places, behind: torch.Tensor) -> None:
    """Write the sealed `digests` (int64 `[num_units]`) to `behind`, uint8 of as many bytes."""
    behind.numpy()[:] = _sealed_on_host(digests, places).view(np.uint8)


def num_right_on_host(digests: torch.Tensor, places: Places, behind: torch.Tensor) -> int:
    """How many of them are the sealed ones of `behind`."""
    claimed = np.frombuffer(behind.numpy().tobytes(), dtype=np.uint64)
    return int((claimed == _sealed_on_host(digests, places)).sum())


def _sealed_on_host(digests: torch.Tensor, places: Places) -> NDArray[np.uint64]:
    layers = np.arange(places.layer_start, places.layer_start + places.num_layers, dtype=np.uint64)
    positions = places.of(places.positions).numpy().view(np.uint64)
    added = places_of(places.seed, layers[:, None], positions).reshape(-1)
    return digests.numpy().view(np.uint64) + added


@jit
def _mixed(bits: tl.tensor) -> tl.tensor:
    """As `_mix`."""
    return finalized(bits + 0x9E3779B97F4A7C15)


@jit
def seal_units(
    digests_ptr: tl.tensor, behind_ptr: tl.tensor, num_right_ptr: tl.tensor,
    positions_ptr: tl.tensor, seed: tl.tensor, layer_start: tl.tensor, num_positions: tl.tensor,
    first: tl.tensor, end: tl.tensor, CHECKS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Of the units `first .. end`, whose digests are complete: write the sealed ones behind the
    units, or count to `num_right_ptr` those that are the ones there. The digests are zero then.

    Other programs added to them: they are taken by an exchange, which no cache of this
    multiprocessor can answer.
    """
    num_right = 0
    for begin in range(first, end, BLOCK):
        unit = begin + tl.arange(0, BLOCK)
        mask = unit < end
        layer = (layer_start + unit // num_positions).to(tl.uint64)
        position = tl.load(positions_ptr + unit % num_positions, mask=mask, other=0).to(tl.uint64)
        place = _mixed(_mixed(seed.to(tl.uint64) ^ (layer * 0xA0761D6478BD642F))
                       ^ (position * 0xD6E8FEB86659FD93))  # fmt: skip
        nothing = tl.zeros([BLOCK], tl.int64)
        digest = tl.atomic_xchg(digests_ptr + unit, nothing, mask=mask, sem="relaxed")
        sealed = (digest.to(tl.uint64) + place).to(tl.int64, bitcast=True)
        if CHECKS:
            claimed = tl.load(behind_ptr + unit, mask=mask, other=0)
            num_right += tl.sum(((claimed == sealed) & mask).to(tl.int32), axis=0)
        else:
            tl.store(behind_ptr + unit, sealed, mask=mask)
    if CHECKS:
        tl.store(num_right_ptr, num_right)
