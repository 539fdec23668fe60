"""Which units a staging slot holds at its front."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class FramePlace(NamedTuple):
    """`num_layers` layers of these blocks, one after the other."""

    layer_start: int
    num_layers: int
    block_ids: tuple[int, ...]

    @property
    def num_units(self) -> int:
        return self.num_layers * len(self.block_ids)

    def units(self, slot: torch.Tensor, unit_bytes: int) -> torch.Tensor:
        """Of the slot, as `[num_layers, num_blocks, unit_bytes]`."""
        front = slot[: self.num_units * unit_bytes]
        return front.view(self.num_layers, len(self.block_ids), unit_bytes)
