"""What both ways to write an answer have in common: watching for the client's leaving, and reading
what has come in turns, so that what has gathered for one client does not hold up all others.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from starlette.types import Receive

    from gateway.choice import Choice, Piece
    from gateway.generation import Generation
    from gateway.request import Request


# Of one answer, read and written between two turns of others.
MAX_TOKENS_AT_ONCE = 512
MIN_TOKENS_AT_ONCE = 8


def tokens_at_once(request: Request) -> int:
    """Each log-probability takes about as long as a token."""
    per_token = 1 + (request.sampling[0].num_logprobs or 0)
    return max(MIN_TOKENS_AT_ONCE, MAX_TOKENS_AT_ONCE // per_token)


async def _watch_disconnect(receive: Receive, generation: Generation) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    generation.leave()


@contextlib.asynccontextmanager
async def in_flight(receive: Receive, generation: Generation) -> AsyncIterator[Callable[[], bool]]:
    """While its answer is written: watched for the client's leaving, closed in the end. What it
    gives says whether the client has left."""
    watcher = asyncio.create_task(_watch_disconnect(receive, generation))
    try:
        with generation.failing():  # the client gets this error, or half an answer
            yield watcher.done
    finally:
        watcher.cancel()
        generation.close()


def read_turn(generation: Generation) -> Iterator[tuple[Choice, Piece]]:
    """What has come for each choice, up to a turn's worth in all. When there is more, the
    generation is due again: let others have their turn first."""
    left = tokens_at_once(generation.request)
    for choice in generation.choices:
        if choice.has_unread and left > 0:
            left -= choice.num_unread_tokens
            piece = choice.take(left + choice.num_unread_tokens)
            left += choice.num_unread_tokens
            generation.settle(choice)
            yield choice, piece
    if left <= 0:
        generation.wake()
