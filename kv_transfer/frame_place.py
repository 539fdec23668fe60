"""What a staging slot holds: units, one layer after the other, and behind them their digests."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kv_transfer.protocol import DIGEST_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from numpy.typing import NDArray

    from kv_transfer.digests import PlaceSeal


def at_positions(table: Sequence[int], positions: tuple[int, ...]) -> tuple[int, ...]:
    """The entries of a table at ascending positions, which mostly follow each other."""
    begin, end = positions[0], positions[-1] + 1
    if end - begin == len(positions):
        return tuple(table[begin:end])
    return tuple([table[position] for position in positions])


class FramePlace(NamedTuple):
    """The units of one frame: the places that `seal` stands for, in these blocks of a pool.

    `table`: block ids of all positions from 0 on, if the device may have these already."""

    seal: PlaceSeal
    block_ids: tuple[int, ...]
    table: tuple[int, ...] | None = None

    @property
    def layer_start(self) -> int:
        return self.seal.layer_start

    @property
    def num_layers(self) -> int:
        return self.seal.num_layers

    @property
    def is_stretch(self) -> bool:
        """Its positions follow each other."""
        positions = self.seal.positions
        return positions[-1] - positions[0] + 1 == len(positions)

    @property
    def num_units(self) -> int:
        return self.seal.num_units

    def units(self, slot: torch.Tensor, unit_bytes: int) -> torch.Tensor:
        """Of a slot, as `[num_layers, num_blocks, unit_bytes]`."""
        front = slot[: self.num_units * unit_bytes]
        return front.view(self.num_layers, len(self.block_ids), unit_bytes)

    def digests(self, slot: torch.Tensor, unit_bytes: int) -> NDArray[np.uint64]:
        """The sealed ones of a slot in host memory, `[num_layers, num_blocks]`; a view."""
        begin = self.num_units * unit_bytes
        behind = slot[begin : begin + self.num_units * DIGEST_BYTES].numpy()
        return behind.view(np.uint64).reshape(self.num_layers, -1)
