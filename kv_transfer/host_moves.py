"""Moves between a paged pool and slots in host memory.

One pool is moved by plain copies, one for each block: as fast as memory, and with no thread of
torch's woken. The parts of several pools are put together by the kernels that do it on a device.

A transport that takes messages in pieces needs no slot: it sends blocks from where they are, and
receives into the blocks that a transfer has reserved, which are its own until its digests match.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from kernels.block_digest import block_digests
from kernels.copy_blocks import pack_blocks, unpack_blocks
from kernels.host_digest import digests_of_pieces, has_host_digests, host_digests
from kv_transfer.digests import DigestKind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kv_transfer.digests import PlaceSeal
    from kv_transfer.frame_place import FramePlace
    from kv_transfer.transports.base import Piece


class HostMoves:
    """`pools`: the parts of the pool, one for each rank of the model."""

    def __init__(self, pools: Sequence[torch.Tensor], takes_digests: bool = True) -> None:
        self._pools = pools
        self._takes_digests = takes_digests
        num_layers, self._num_blocks, unit_bytes = pools[0].shape
        self._unit_bytes = unit_bytes * len(pools)
        self._words = _as_words(pools[0]) if len(pools) == 1 else None
        self._units = pools[0].view(num_layers * self._num_blocks, unit_bytes).numpy()

    @property
    def digest_kinds(self) -> tuple[DigestKind, ...]:
        """What can be computed here, the fastest first."""
        if has_host_digests():
            return (DigestKind.XXH3, DigestKind.MULTIPLY_SHIFT)
        return (DigestKind.MULTIPLY_SHIFT,)

    def has_pieces(self, digest: DigestKind) -> bool:
        """Whether blocks can be sent and received where they are."""
        return self._words is not None and digest is DigestKind.XXH3

    def pieces(self, frame: FramePlace) -> list[Piece]:
        """The units of a frame, in the order they would have in a slot."""
        first, step = frame.layer_start * self._num_blocks, self._num_blocks
        layers = range(first, first + frame.num_layers * step, step)
        return [self._units[layer + block] for layer in layers for block in frame.block_ids]

    def gather(self, slot: torch.Tensor, frame: FramePlace, digest: DigestKind) -> None:
        """Copy blocks into `slot`, and write their sealed digests behind them."""
        units = frame.units(slot, self._unit_bytes)
        if self._words is not None:
            layers = self._words[frame.layer_start : frame.layer_start + len(units)]
            packed = _as_words(units)
            for index, block_id in enumerate(frame.block_ids):
                packed[:, index] = layers[:, block_id]
        else:
            ids = torch.tensor(frame.block_ids, dtype=torch.int64)
            for part, pool in enumerate(self._pools):
                pack_blocks(
                    pool, frame.layer_start, len(units), ids, units,
                    part=part, num_parts=len(self._pools),
                )  # fmt: skip
        if self._takes_digests:
            behind = frame.digests(slot, self._unit_bytes)
            behind[:] = frame.seal.seal(unit_digests(units, digest))

    def scatter(self, slot: torch.Tensor, frame: FramePlace, digest: DigestKind) -> bool:
        """Copy `slot` into blocks if the digests behind it are right; gives the verdict."""
        units = frame.units(slot, self._unit_bytes)
        if self._takes_digests:
            sealed = frame.seal.seal(unit_digests(units, digest))
            if not np.array_equal(sealed, frame.digests(slot, self._unit_bytes)):
                return False
        if self._words is not None:
            layers = self._words[frame.layer_start : frame.layer_start + len(units)]
            packed = _as_words(units)
            for index, block_id in enumerate(frame.block_ids):
                layers[:, block_id] = packed[:, index]
        else:
            ids = torch.tensor(frame.block_ids, dtype=torch.int64)
            for part, pool in enumerate(self._pools):
                unpack_blocks(
                    units, pool, frame.layer_start, len(units), ids,
                    part=part, num_parts=len(self._pools),
                )  # fmt: skip
        return True


class _PieceDigests:
    """Sealed digests of the units of `seal`, which are taken some at a time, in their order."""

    def __init__(self, seal: PlaceSeal) -> None:
        self._seal = seal
        self._found: list[int] = []

    def add(self, units: Sequence[Piece]) -> None:
        self._found += digests_of_pieces(units)

    @property
    def _are_all(self) -> bool:
        return len(self._found) == self._seal.num_units

    def _sealed(self) -> NDArray[np.uint64]:
        found = np.array(self._found, dtype=np.uint64)
        return self._seal.seal(found.reshape(self._seal.num_layers, -1)).reshape(-1)


class DepartureDigests(_PieceDigests):
    """Of units that leave. `sealed`, uint64 `[num_units]`, leaves behind them: it is written when
    the last of them has been taken."""

    def __init__(self, seal: PlaceSeal) -> None:
        super().__init__(seal)
        self.sealed: NDArray[np.uint64] = np.zeros(seal.num_units, dtype=np.uint64)

    def add(self, units: Sequence[Piece]) -> None:
        super().add(units)
        if self._are_all:
            self.sealed[:] = self._sealed()


class ArrivalDigests(_PieceDigests):
    """Of units that arrive. `claimed`, uint64 `[num_units]`, is what arrives behind them."""

    def __init__(self, seal: PlaceSeal) -> None:
        super().__init__(seal)
        self.claimed: NDArray[np.uint64] = np.zeros(seal.num_units, dtype=np.uint64)

    @property
    def are_right(self) -> bool:
        """Whether all units arrived, and are what was claimed."""
        return self._are_all and np.array_equal(self._sealed(), self.claimed)


def unit_digests(units: torch.Tensor, digest: DigestKind) -> NDArray[np.uint64]:
    """uint8 `[num_layers, num_blocks, unit_bytes]` -> uint64 `[num_layers, num_blocks]`."""
    num_layers, num_blocks, _ = units.shape
    if digest is DigestKind.XXH3:
        digests = host_digests(units, num_layers * num_blocks)
    else:
        digests = block_digests(units, num_layers * num_blocks).numpy().view(np.uint64)
    return digests.reshape(num_layers, num_blocks)


def _as_words(blocks: torch.Tensor) -> NDArray[np.generic]:
    """The same memory in words of 8 bytes where units allow it."""
    whole = blocks.shape[2] % 8 == 0 and blocks.storage_offset() % 8 == 0
    return blocks.view(torch.int64).numpy() if whole else blocks.numpy()
