"""What the prefix cache gained and lost, for who tells others of it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from cluster.prefix_hash import BlockHash
    from engine.block_manager import BlockManager
    from engine.loop import EngineLoop

Changes = tuple["Sequence[BlockHash]", "Sequence[BlockHash]"]


def cache_changes(
    loop: EngineLoop, block_manager: BlockManager
) -> Callable[[bool], Awaitable[Changes]]:
    """A coroutine function: hashes stored and removed since its last call; given True, all that
    are cached now. Asks on the engine's thread, so it waits for the step that runs."""

    def take(everything: bool) -> Changes:
        events = block_manager.take_events()
        if everything:
            return block_manager.cached_hashes(), events.removed
        return events.stored, events.removed

    async def ask(everything: bool) -> Changes:
        return await asyncio.wrap_future(loop.call(lambda: take(everything)))

    return ask
