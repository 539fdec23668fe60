"""Ctrl-C while a measurement runs: the first ends it in order, the next ends the program at once.

What was measured until then is the reader's: nobody waits for an hour to lose it by one key.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator


@contextlib.contextmanager
def interrupts_set(cut: asyncio.Event) -> Iterator[None]:
    """Inside, the first Ctrl-C sets `cut`. From then on, and outside, it is `KeyboardInterrupt`.
    A thread beside the main one never hears of it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()

    def first() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        cut.set()
        print("Cut short; what was measured follows. Ctrl-C again ends at once.", file=sys.stderr)

    loop.add_signal_handler(signal.SIGINT, first)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


async def unless_cut(work: Coroutine[None, None, None], cut: asyncio.Event) -> None:
    """Do `work` until it ends, or `cut` is set: it is cancelled then, and over on return."""
    working = asyncio.create_task(work)
    waiting = asyncio.create_task(cut.wait())
    try:
        await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (working, waiting):
            task.cancel()
        await asyncio.wait({working, waiting})
    if not working.cancelled():
        working.result()
