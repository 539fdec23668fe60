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

from kernels.dispatch import jit, jit_for_any, runs_triton, tl
from kernels.splitmix import GOLDEN, finalize, finalized

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BLOCK = 256
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
    """Of a frame's units, layer by layer. `seed`: 63 bits. `positions`: int64, the first
    `num_positions` count, on the device of the digests."""

    seed: int
    layer_start: int
    num_layers: int
    positions: torch.Tensor
    num_positions: int

    @property
    def num_units(self) -> int:
        return self.num_layers * self.num_positions


class Verdict:
    """Of one comparison at a time, in host memory that the device writes to. A comparison that
    never ran, or only in part, has not verified anything.

    `num_right`: int32, the units that each program of the comparison found right.
    """

    __slots__ = ("_view", "num_right")

    def __init__(self, max_units: int, *, is_pinned: bool) -> None:
        size = _num_programs(max_units)
        self.num_right = torch.zeros(size, dtype=torch.int32, pin_memory=is_pinned)
        self._view = self.num_right.numpy()

    def reset(self) -> None:
        """Nothing is verified. Before a comparison is launched, after the last one has ended."""
        self._view.fill(0)

    def has_verified(self, num_units: int) -> bool:
        """Whether so many units, those of the whole comparison, were right. Once it has ended."""
        return int(self._view.sum()) == num_units


def _num_programs(num_units: int) -> int:
    return -(-num_units // _BLOCK)


def seal_digests(
    digests: torch.Tensor, places: Places, slot: torch.Tensor, units_bytes: int
) -> None:
    """Write the sealed digests of units behind them in their slot; `digests` are 0 after.

    digests: int64, the first are those of the units. slot: uint8; its units take `units_bytes`, a
    multiple of 8.
    """
    _run(digests, places, slot, units_bytes, None)


def check_digests(
    digests: torch.Tensor,
    places: Places,
    slot: torch.Tensor,
    units_bytes: int,
    num_right: torch.Tensor,
) -> None:
    """Count the sealed digests that are the ones behind the units of `slot`. `num_right`: that of a
    `Verdict` that was reset, or int32 on the device. The rest as for `seal_digests`."""
    _run(digests, places, slot, units_bytes, num_right)


def _run(
    digests: torch.Tensor,
    places: Places,
    slot: torch.Tensor,
    units_bytes: int,
    num_right: torch.Tensor | None,
) -> None:
    num_units = places.num_units
    assert units_bytes % 8 == 0
    assert num_units <= digests.numel()
    assert units_bytes + 8 * num_units <= slot.numel()
    assert num_right is None or _num_programs(num_units) <= num_right.numel()
    if num_units == 0:
        return
    if not runs_triton(slot):
        _run_reference(digests, places, slot, units_bytes, num_right)
        return
    _seal_kernel[(_num_programs(num_units),)](
        digests, slot, slot if num_right is None else num_right, places.positions,
        places.seed, places.layer_start, places.num_positions, num_units, units_bytes // 8,
        CHECKS=num_right is not None, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip


def _run_reference(
    digests: torch.Tensor,
    places: Places,
    slot: torch.Tensor,
    units_bytes: int,
    num_right: torch.Tensor | None,
) -> None:
    layers = np.arange(places.layer_start, places.layer_start + places.num_layers, dtype=np.uint64)
    positions = places.positions[: places.num_positions].numpy().view(np.uint64)
    found = digests.numpy()[: places.num_units]
    added = places_of(places.seed, layers[:, None], positions).reshape(-1)
    sealed = (found.view(np.uint64) + added).view(np.uint8)
    found[:] = 0
    behind = slot.numpy()[units_bytes : units_bytes + sealed.nbytes]
    if num_right is None:
        behind[:] = sealed
    else:
        num_right[0] = int((behind.view(np.uint64) == sealed.view(np.uint64)).sum())


@jit
def _mixed(bits: tl.tensor) -> tl.tensor:
    """As `_mix`."""
    return finalized(bits + 0x9E3779B97F4A7C15)


@jit_for_any("seed", "layer_start", "num_positions", "num_units", "begin")
def _seal_kernel(
    digests_ptr: tl.tensor, slot_ptr: tl.tensor, num_right_ptr: tl.tensor, positions_ptr: tl.tensor,
    seed: tl.tensor, layer_start: tl.tensor, num_positions: tl.tensor, num_units: tl.tensor,
    begin: tl.tensor, CHECKS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    unit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = unit < num_units
    layer = (layer_start + unit // num_positions).to(tl.uint64)
    position = tl.load(positions_ptr + unit % num_positions, mask=mask, other=0).to(tl.uint64)
    place = _mixed(_mixed(seed.to(tl.uint64) ^ (layer * 0xA0761D6478BD642F))
                   ^ (position * 0xD6E8FEB86659FD93))  # fmt: skip
    digest = tl.load(digests_ptr + unit, mask=mask, other=0).to(tl.uint64)
    sealed = (digest + place).to(tl.int64, bitcast=True)
    tl.store(digests_ptr + unit, tl.zeros_like(sealed), mask=mask)
    behind = slot_ptr.to(tl.pointer_type(tl.int64)) + begin + unit
    if CHECKS:
        claimed = tl.load(behind, mask=mask, other=0)
        num_right = tl.sum(((claimed == sealed) & mask).to(tl.int32), axis=0)
        tl.store(num_right_ptr + tl.program_id(0), num_right)
    else:
        tl.store(behind, sealed, mask=mask)
