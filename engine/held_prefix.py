"""Holds what is cached of a prompt, for who reads it from outside the engine's thread."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import TYPE_CHECKING

from cluster.prefix_hash import hash_blocks, root_hash
from engine.loop_errors import unawaited
from engine.restores import Wish

if TYPE_CHECKING:
    from cluster.request import SequenceRequest
    from engine.loop import EngineLoop
    from engine.reservation import Hold
    from engine.restores import Restores


async def hold_prefix(
    loop: EngineLoop,
    restores: Restores,
    prefix: SequenceRequest,
    model_key: str,
    restore_seconds_per_token: float,
) -> Hold:
    """The blocks of the pool that hold the longest cached beginning of this prompt, maybe none;
    what host memory has of it is brought there first if that takes no longer than said. Waits for
    the step that runs, and for that copy. Release it on the engine's thread; a caller that is
    cancelled meanwhile holds nothing."""
    root = root_hash(model_key, prefix.cache_salt)
    hashes = hash_blocks(prefix.prompt_token_ids, restores.block_size, root)
    answer: Future[Hold] = Future()
    seconds_per_block = restore_seconds_per_token * restores.block_size
    wish = Wish(hashes, f"{prefix.sequence_id}, given away", seconds_per_block, answer)
    asking = loop.call(lambda: restores.begin(wish))
    asking.add_done_callback(lambda done: _pass_failure(done, answer))
    try:
        return await asyncio.wrap_future(answer)
    except asyncio.CancelledError:  # the hold may be on its way here
        answer.add_done_callback(lambda late: _release(loop, late))
        raise


def _pass_failure(asking: Future[None], answer: Future[Hold]) -> None:
    """Nobody waits for an engine that has ended, or that could not even look."""
    if asking.cancelled():
        answer.cancel()
    elif (error := asking.exception()) is not None and not answer.done():
        answer.set_exception(error)


def _release(loop: EngineLoop, answer: Future[Hold]) -> None:
    if not answer.cancelled() and answer.exception() is None:
        unawaited(loop.call(answer.result().release))
