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

    from kv_transfer.frame_place import FramePlace
    from kv_transfer.transports.base import Piece


class HostMoves:
    """`pools`: the parts of the pool, one for each rank of the model."""

    def __init__(self, pools: Sequence[torch.Tensor]) -> None:
        self._pools = pools
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

    def pieces(self, layer_start: int, num_layers: int, block_ids: Sequence[int]) -> list[Piece]:
        """The units of these layers of these blocks, in the order they would have in a slot."""
        first, step = layer_start * self._num_blocks, self._num_blocks
        layers = range(first, first + num_layers * step, step)
        return [self._units[layer + block] for layer in layers for block in block_ids]

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
        behind = frame.digests(slot, self._unit_bytes)
        behind[:] = frame.seal.seal(unit_digests(units, digest))

    def scatter(self, slot: torch.Tensor, frame: FramePlace, digest: DigestKind) -> bool:
        """Copy `slot` into blocks if the digests behind it are right; gives the verdict."""
        units = frame.units(slot, self._unit_bytes)
        claimed = frame.digests(slot, self._unit_bytes)
        if not np.array_equal(frame.seal.seal(unit_digests(units, digest)), claimed):
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


class ArrivalDigests:
    """Digests of `num_units` pieces in the order in which they arrive; what follows is no unit."""

    def __init__(self, num_units: int) -> None:
        self._num_left = num_units
        self._parts: list[NDArray[np.uint64]] = []

    def add(self, pieces: Sequence[Piece]) -> None:
        units = pieces[: self._num_left]
        self._num_left -= len(units)
        if units:
            self._parts.append(piece_digests(units, 1))

    def as_array(self, num_layers: int) -> NDArray[np.uint64] | None:
        """`[num_layers, num_blocks]`; None when fewer have arrived."""
        if self._num_left or not self._parts:
            return None
        return np.concatenate([part.reshape(-1) for part in self._parts]).reshape(num_layers, -1)


def unit_digests(units: torch.Tensor, digest: DigestKind) -> NDArray[np.uint64]:
    """uint8 `[num_layers, num_blocks, unit_bytes]` -> uint64 `[num_layers, num_blocks]`."""
    num_layers, num_blocks, _ = units.shape
    if digest is DigestKind.XXH3:
        digests = host_digests(units, num_layers * num_blocks)
    else:
        digests = block_digests(units, num_layers * num_blocks).numpy().view(np.uint64)
    return digests.reshape(num_layers, num_blocks)


def piece_digests(pieces: Sequence[Piece], num_layers: int) -> NDArray[np.uint64]:
    """XXH3 of units, layer by layer -> uint64 `[num_layers, num_blocks]`."""
    return digests_of_pieces(pieces).reshape(num_layers, -1)


def _as_words(blocks: torch.Tensor) -> NDArray[np.generic]:
    """The same memory in words of 8 bytes where units allow it."""
    whole = blocks.shape[2] % 8 == 0 and blocks.storage_offset() % 8 == 0
    return blocks.view(torch.int64).numpy() if whole else blocks.numpy()
