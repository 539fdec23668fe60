"""Keeps the event loop awake while more of a hand-off is about to come.

Between the layers of a prompt pass a few milliseconds. A loop that sleeps meanwhile takes longer to
wake up, and to find its code again, than a layer takes on the wire; the last one, and the commit
behind it, are what a first token's successor waits for.

Life of a lookout
    1. `stay`, behind a ticket and with every frame: the loop goes round for `STAY_SECONDS` more,
       and rehearses what is about to come, now and then: here the next frame (`rehearsal.py`), and
       on the engine's thread the launch of a first step.
    2. `placed`, when a frame is in its blocks: the last may have been the last of all, so the
       engine rehearses at once.
    3. `rest`, when a sequence starts: the engine needs the interpreter, and all has come.
    4. While anything is decoded it does not stay: steps would pay for it, and a sequence that
       starts waits for the end of one anyway.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

STAY_SECONDS = 0.01  # a layer of 8192 tokens takes 7 ms
REHEARSE_AFTER_SECONDS = 0.0015  # before that the frame itself is under way
START_EVERY_SECONDS = 0.001  # a tenth of it is spent, on another thread


class Lookout:
    def __init__(
        self,
        is_decoding: Callable[[], bool],
        rehearse: Callable[[], None] = lambda: None,
        rehearse_start: Callable[[], None] = lambda: None,
    ) -> None:
        """`rehearse` what a frame takes here; `rehearse_start`: tell the engine to do the same."""
        self._is_decoding = is_decoding
        self._rehearse = rehearse
        self._rehearse_start = rehearse_start
        self._start_rehearsed = 0.0
        self._begun = 0.0  # the last frame; a loop's own clock knows milliseconds only
        self._until = 0.0
        self._is_awake = False

    def stay(self) -> None:
        self._begun = time.monotonic()
        self._until = self._begun + STAY_SECONDS
        if not self._is_awake:
            self._is_awake = True
            loop = asyncio.get_running_loop()
            loop.call_soon(self._look, loop)

    def placed(self) -> None:
        if not self._is_decoding():
            self._start_rehearsed = time.monotonic()
            self._rehearse_start()

    def rest(self) -> None:
        self._until = 0.0

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        now = time.monotonic()
        self._is_awake = now < self._until and not self._is_decoding()
        if self._is_awake:
            if now >= self._begun + REHEARSE_AFTER_SECONDS:
                self._rehearse()
            if now >= self._start_rehearsed + START_EVERY_SECONDS:
                self._start_rehearsed = now
                self._rehearse_start()
            loop.call_soon(self._look, loop)
