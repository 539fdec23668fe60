"""Waits, for a bounded time, until a node has nothing to do."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from cluster.errors import Overloaded

if TYPE_CHECKING:
    from collections.abc import Callable

IDLE_SECONDS = 2.0
POLL_SECONDS = 0.02


async def until_idle(is_idle: Callable[[], bool], name: str) -> None:
    """Raises `Overloaded` when `name` still has work after `IDLE_SECONDS`."""
    try:
        async with asyncio.timeout(IDLE_SECONDS):
            while not is_idle():  # noqa: ASYNC110 - what it asks has no event
                await asyncio.sleep(POLL_SECONDS)
    except TimeoutError:
        raise Overloaded(f"{name} is busy.", reason="busy") from None
