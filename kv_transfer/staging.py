"""The staging slots of one node: the memory that a transport reads and writes. Plain TCP alone
takes blocks where they are; a slot then stays empty, and bounds how much is on its way.

Life of a slot
    1. Allocated once at start, on the device of the KV pool.
    2. `acquire`: one frame owns it, from before its bytes are packed or received until nobody
       can touch it any more. Who asks first is served first, but one owner (one peer) gets no
       more than three quarters, so that a peer that hangs cannot stop the others.
    3. `release`: free for the next frame. A slot whose operation never ends, not even when its
       connection is cut, is never released.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cluster.errors import ConfigError
from kv_transfer.mapped_slots import PROOF_BYTES, describe
from kv_transfer.protocol import DIGEST_BYTES

if TYPE_CHECKING:
    from collections.abc import Hashable

    from kv_transfer.protocol import FrameLimits

_ALIGNMENT = 512


@dataclass(frozen=True, slots=True, eq=False)
class StagingSlot:
    """`payload` is uint8 on the pool's device, of `slot_bytes` for units and room for their digests
    behind; `header` uint8 in host memory.

    The memory comes back, the object does not: `generation` counts its owners, so that who kept a
    slot too long is told from who has it now."""

    index: int
    generation: int
    payload: torch.Tensor
    header: torch.Tensor


@dataclass(slots=True, eq=False)
class _Waiter:
    owner: Hashable
    future: asyncio.Future[StagingSlot]


class Staging:
    """A fixed set of slots. One event loop uses it; nothing here blocks a thread."""

    def __init__(
        self,
        *,
        slot_bytes: int,
        num_slots: int,
        limits: FrameLimits,
        device: torch.device,
        max_share: int | None = None,
    ) -> None:
        """`max_share`: slots of one owner, if fewer than he would get. Raises `ConfigError` when a
        slot cannot hold one layer of one block, or when the slots do not fit on the device."""
        if slot_bytes < limits.unit_bytes:
            raise ConfigError(
                f"--staging-slot-bytes must be at least {limits.unit_bytes}, "
                "one layer of one KV block.",
                param="staging_slot_bytes",
            )
        self.slot_bytes = slot_bytes
        self.num_slots = num_slots
        self.device = device
        row_bytes = -(-(slot_bytes + DIGEST_BYTES * limits.max_units) // _ALIGNMENT) * _ALIGNMENT
        memory, self._proof_at = _allocate(num_slots, row_bytes, device)
        self._memory = memory
        self._description: bytes | None = None
        headers = torch.zeros((num_slots, limits.max_header_bytes), dtype=torch.uint8)
        self._free = deque(
            StagingSlot(index, 0, memory[index], headers[index]) for index in range(num_slots)
        )
        share = num_slots - -(-num_slots // 4)
        self._share = max(1, min(share, max_share or share))
        self._owners: dict[StagingSlot, Hashable] = {}
        self._num_owned: Counter[Hashable] = Counter()
        self._scratch: torch.Tensor | None = None
        self._waiters: deque[_Waiter] = deque()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def num_owned_by(self, owner: Hashable) -> int:
        return self._num_owned[owner]

    @property
    def description(self) -> bytes:
        """How another process on this machine maps the slots; nothing in host memory."""
        if self._description is None:
            on_device = self.device.type == "cuda"
            self._description = describe(self._memory, self._proof_at) if on_device else b""
        return self._description

    @property
    def scratch(self) -> torch.Tensor:
        """Memory of one slot's size for payloads that nobody wants; shared by all of them."""
        if self._scratch is None:
            self._scratch = torch.empty_like(self._memory[0])
        return self._scratch

    async def acquire(self, owner: Hashable) -> StagingSlot:
        """Wait for a slot. Cancelling the wait leaves nothing behind."""
        waiter = _Waiter(owner, asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        self._serve()
        try:
            return await waiter.future
        except asyncio.CancelledError:
            self._forget(waiter)
            raise

    def take(self, owner: Hashable) -> StagingSlot | None:
        """A slot, if one is free that nobody else waits for."""
        if not self._free or self._num_owned[owner] >= self._share:
            return None  # whoever waits beside a free slot has his share
        return self._give(owner)

    def owns(self, slot: StagingSlot) -> bool:
        """Whether it is still his who acquired it. To be asked before its bytes are believed."""
        return slot in self._owners

    def release(self, slot: StagingSlot) -> None:
        """Raises `KeyError` for a slot that was released before."""
        self._disown(slot)
        again = StagingSlot(slot.index, slot.generation + 1, slot.payload, slot.header)
        self._free.append(again)
        self._serve()

    def check_integrity(self) -> None:
        """Raises `AssertionError` when slots were lost or counted twice."""
        if len(self._free) + len(self._owners) != self.num_slots:
            raise AssertionError("staging slots do not add up")
        if sum(self._num_owned.values()) != len(self._owners):
            raise AssertionError("owners of staging slots do not add up")

    def _serve(self) -> None:
        for waiter in list(self._waiters):
            if not self._free:
                return
            if waiter.future.done() or self._num_owned[waiter.owner] >= self._share:
                continue
            self._waiters.remove(waiter)
            waiter.future.set_result(self._give(waiter.owner))

    def _give(self, owner: Hashable) -> StagingSlot:
        slot = self._free.pop()  # the one used last: its memory is in the cache
        self._owners[slot] = owner
        self._num_owned[owner] += 1
        return slot

    def _forget(self, waiter: _Waiter) -> None:
        if waiter in self._waiters:
            self._waiters.remove(waiter)
        elif waiter.future.done() and not waiter.future.cancelled():
            self.release(waiter.future.result())

    def _disown(self, slot: StagingSlot) -> None:
        owner = self._owners.pop(slot)
        self._num_owned[owner] -= 1
        if not self._num_owned[owner]:
            del self._num_owned[owner]


def _allocate(
    num_slots: int, slot_bytes: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """All slots, and behind them the place of their proof."""
    num_bytes = num_slots * slot_bytes
    try:
        memory = torch.empty(num_bytes + PROOF_BYTES, dtype=torch.uint8, device=device)
        return memory[:num_bytes].view(num_slots, slot_bytes), memory[num_bytes:]
    except RuntimeError as error:
        # On a CPU torch has no class for it.
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise ConfigError(
            f"--num-staging-slots {num_slots} of {slot_bytes >> 20} MiB do not fit on {device} "
            f"beside the engine: lower it, --staging-slot-bytes or --gpu-memory-utilization.",
            param="num_staging_slots",
        ) from None
