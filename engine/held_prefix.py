"""Holds what is cached of a prompt, for who reads it from outside the engine's thread."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from cluster.prefix_hash import hash_blocks, root_hash

if TYPE_CHECKING:
    from cluster.request import SequenceRequest
    from engine.block_manager import BlockManager
    from engine.loop import EngineLoop
    from engine.reservation import Hold


async def hold_prefix(
    loop: EngineLoop,
    block_manager: BlockManager,
    prefix: SequenceRequest,
    model_key: str,
) -> Hold:
    """The blocks of the pool that hold the longest cached beginning of this prompt, maybe none.
    Waits for the step that runs. Release it on the engine's thread."""
    root = root_hash(model_key, prefix.cache_salt)
    hashes = hash_blocks(prefix.prompt_token_ids, block_manager.block_size, root)

    def hold() -> Hold:
        found = block_manager.match_prefix(hashes)
        return block_manager.hold(found, f"{prefix.sequence_id}, given away")

    return await asyncio.wrap_future(loop.call(hold))
