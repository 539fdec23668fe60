"""Moves between a paged pool and slots in host memory.

One pool is moved by plain copies, one for each block: as fast as memory, and with no thread of
torch's woken. The parts of several pools are put together by the kernels that do it on a device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from kernels.block_digest import block_digests
from kernels.copy_blocks import pack_blocks, unpack_blocks
from kernels.host_digest import has_host_digests, host_digests
from kv_transfer.digests import DigestKind

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray


class HostMoves:
    """`pools`: the parts of the pool, one for each rank of the model. `units` below is the front of
    a slot, uint8 `[num_layers, num_blocks, unit_bytes]`, contiguous."""

    def __init__(self, pools: Sequence[torch.Tensor]) -> None:
        self._pools = pools
        self._words: NDArray[np.generic] | None = None
        if len(pools) == 1 and pools[0].device.type == "cpu":
            self._words = _as_words(pools[0])

    @property
    def digest_kinds(self) -> tuple[DigestKind, ...]:
        """What can be computed here, the fastest first."""
        if has_host_digests():
            return (DigestKind.XXH3, DigestKind.MULTIPLY_SHIFT)
        return (DigestKind.MULTIPLY_SHIFT,)

    def gather(
        self, units: torch.Tensor, layer_start: int, block_ids: Sequence[int], digest: DigestKind
    ) -> NDArray[np.uint64]:
        """Copy blocks into `units`. Returns the digests, `[num_layers, num_blocks]`."""
        if self._words is not None:
            layers = self._words[layer_start : layer_start + len(units)]
            packed = _as_words(units)
            for index, block_id in enumerate(block_ids):
                packed[:, index] = layers[:, block_id]
        else:
            ids = torch.tensor(block_ids, dtype=torch.int64)
            for part, pool in enumerate(self._pools):
                pack_blocks(
                    pool, layer_start, len(units), ids, units,
                    part=part, num_parts=len(self._pools),
                )  # fmt: skip
        return unit_digests(units, digest)

    def scatter(
        self,
        units: torch.Tensor,
        layer_start: int,
        block_ids: Sequence[int],
        digest: DigestKind,
        accepts: Callable[[NDArray[np.uint64]], bool],
    ) -> bool:
        """Copy `units` into blocks if `accepts` their digests; gives the verdict."""
        if not accepts(unit_digests(units, digest)):
            return False
        if self._words is not None:
            layers = self._words[layer_start : layer_start + len(units)]
            packed = _as_words(units)
            for index, block_id in enumerate(block_ids):
                layers[:, block_id] = packed[:, index]
        else:
            ids = torch.tensor(block_ids, dtype=torch.int64)
            for part, pool in enumerate(self._pools):
                unpack_blocks(
                    units, pool, layer_start, len(units), ids,
                    part=part, num_parts=len(self._pools),
                )  # fmt: skip
        return True


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
