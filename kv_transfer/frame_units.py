"""The front of a staging slot, as the units of some layers of some blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


class FrameUnits:
    """`front`: uint8 `[num_units * unit_bytes]`; `units`: the same as `[num_layers, num_blocks,
    unit_bytes]`."""

    __slots__ = ("block_ids", "front", "layer_start", "num_layers", "num_units", "units")

    def __init__(
        self,
        slot: torch.Tensor,
        layer_start: int,
        num_layers: int,
        block_ids: Sequence[int],
        unit_bytes: int,
    ) -> None:
        self.layer_start = layer_start
        self.num_layers = num_layers
        self.block_ids = block_ids
        self.num_units = num_layers * len(block_ids)
        self.front = slot[: self.num_units * unit_bytes]
        self.units = self.front.view(num_layers, len(block_ids), unit_bytes)
