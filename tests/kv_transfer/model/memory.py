"""What stands in blocks and slots: one number a unit, which says of whose tokens it is."""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING

import numpy as np
import torch

from kv_transfer.protocol import FrameLimits
from kv_transfer.staging import Staging, StagingSlot

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from numpy.typing import NDArray

NUM_LAYERS = 2
BLOCK_SIZE = 2
UNIT_BYTES = 8
MAX_UNITS = 4
LIMITS = FrameLimits(NUM_LAYERS, UNIT_BYTES, MAX_UNITS * UNIT_BYTES)


def right_unit(token_ids: Sequence[int], position: int, layer: int) -> int:
    """What belongs into this block of a prompt: a function of all tokens up to its end."""
    tokens = token_ids[: (position + 1) * BLOCK_SIZE]
    digest = hashlib.blake2b(repr((tuple(tokens), layer)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class Pool:
    """The units of all blocks, `[NUM_LAYERS, num_blocks]`."""

    def __init__(self, num_blocks: int) -> None:
        self.units = np.zeros((NUM_LAYERS, num_blocks), dtype=np.uint64)

    def compute(self, token_ids: Sequence[int], table: Sequence[int], positions: range) -> None:
        for position in positions:
            for layer in range(NUM_LAYERS):
                unit = right_unit(token_ids, position, layer)
                self.units[layer, table[position]] = unit

    def check(self, token_ids: Sequence[int], table: Sequence[int], positions: range) -> None:
        """Raises `AssertionError` where another prompt's KV stands."""
        for position in positions:
            for layer in range(NUM_LAYERS):
                found = int(self.units[layer, table[position]])
                assert found == right_unit(token_ids, position, layer), "KV of somebody else"


class Slots:
    """The real staging slots, without waiting: a slot is there now or not."""

    def __init__(self, num_slots: int, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.staging = Staging(
            slot_bytes=LIMITS.slot_bytes,
            num_slots=num_slots,
            limits=LIMITS,
            device=torch.device("cpu"),
        )

    def take(self, owner: Hashable) -> StagingSlot | None:
        async def ask() -> StagingSlot | None:
            asking = asyncio.ensure_future(self.staging.acquire(owner))
            await asyncio.sleep(0)
            if not asking.done():
                asking.cancel()
            [slot] = await asyncio.gather(asking, return_exceptions=True)
            return slot if isinstance(slot, StagingSlot) else None

        return self._loop.run_until_complete(ask())


def units_of(slot: StagingSlot, num_layers: int, num_blocks: int) -> NDArray[np.uint64]:
    """The front of a slot, `[num_layers, num_blocks]`; a view."""
    front, _ = np.split(payload_of(slot, num_layers * num_blocks), 2)
    return front.reshape(num_layers, num_blocks)


def sealed_of(slot: StagingSlot, num_layers: int, num_blocks: int) -> NDArray[np.uint64]:
    """The digests behind them; a view."""
    _, behind = np.split(payload_of(slot, num_layers * num_blocks), 2)
    return behind.reshape(num_layers, num_blocks)


def payload_of(slot: StagingSlot, num_units: int) -> NDArray[np.uint64]:
    """Units and digests, each of 8 bytes; a view."""
    return slot.payload[: LIMITS.payload_bytes(num_units)].numpy().view(np.uint64)
