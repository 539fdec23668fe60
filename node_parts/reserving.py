"""Reservations that are made on the engine's thread, for who may be gone when they are there."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from engine.loop_errors import unawaited

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from engine.loop import EngineLoop
    from engine.reservation import Reservation


async def reserved(
    loop: EngineLoop, reserve: Callable[[], Reservation | None]
) -> Reservation | None:
    """What `reserve` gives. A caller that is cancelled meanwhile has nothing reserved."""
    asking = loop.call(reserve)
    try:
        return await asyncio.wrap_future(asking)
    except asyncio.CancelledError:  # it may be on its way here
        asking.add_done_callback(lambda late: _give_back(loop, late))
        raise


def _give_back(loop: EngineLoop, late: Future[Reservation | None]) -> None:
    """On any thread."""
    if late.cancelled() or late.exception() is not None:
        return
    reservation = late.result()
    if reservation is not None:
        unawaited(loop.call(reservation.cancel))
