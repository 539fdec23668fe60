"""Blocks for hand-offs that are only measured: of those that hold nothing, so that nothing cached
makes room for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.errors import Overloaded
from node_parts.reserving import reserved

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.block_manager import BlockManager
    from engine.loop import EngineLoop
    from engine.reservation import Reservation


async def reserve_spare(
    loop: EngineLoop, manager: BlockManager, name: str, share_of: Callable[[int], int]
) -> Reservation:
    """`share_of` the number that is spare, for the measurement `name`. Raises `Overloaded` when
    that is none."""

    def take() -> Reservation | None:
        num_blocks = share_of(manager.num_ready_blocks)
        if num_blocks == 0:
            return None
        return manager.reserve((), num_blocks * manager.block_size, f"measuring {name}")

    reservation = await reserved(loop, take)
    if reservation is None:
        raise no_spare_blocks()
    return reservation


def no_spare_blocks() -> Overloaded:
    return Overloaded("There are no spare KV blocks to measure with.", reason="no_blocks")
