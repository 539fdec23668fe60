"""Waiting, on the event loop, for what the device has done.

Life of a question
    1. `EventQueue.when(event, tell)`: events in the order they were recorded, of one stream or of
       two that take turns.
    2. The oldest is asked about: in every round of the event loop while it is urgent, which keeps
       this thread busy for microseconds and answers at once; every millisecond while it is not.
    3. `tell` is called, with the error if the device has one, and the next one is asked about.

A thread that waits for an event and then wakes the loop would take longer than most moves take.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

from cluster.isolation import isolated

logger = logging.getLogger(__name__)

REST_SECONDS = 0.001  # what an event loop's timers can tell apart


class Event(Protocol):
    """A CUDA event, as far as it matters here."""

    def query(self) -> bool: ...


Tell = Callable[["Exception | None"], None]


class _Question(NamedTuple):
    event: Event
    is_urgent: bool
    tell: Tell


class EventQueue:
    """Used on one event loop."""

    def __init__(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """`meanwhile`: called in each round that waits for an urgent event, and nothing else."""
        self._meanwhile = meanwhile
        self._questions: deque[_Question] = deque()
        self._is_asking = False

    def when(self, event: Event, tell: Tell, *, is_urgent: bool) -> None:
        """Call `tell` when `event` has happened, and those given before it."""
        self._questions.append(_Question(event, is_urgent, tell))
        if not self._is_asking:
            self._is_asking = True
            loop = asyncio.get_running_loop()
            loop.call_soon(self._ask, loop)

    def _ask(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._questions:
            question = self._questions[0]
            error: RuntimeError | None = None
            try:
                has_happened = question.event.query()
            except RuntimeError as problem:  # the device's; whoever waits must hear of it
                has_happened, error = True, problem
            if not has_happened:
                self._ask_again(loop, question)
                return
            self._questions.popleft()
            # Now: another round of the loop takes its time.
            tell = partial(question.tell, error)
            isolated(tell, "an event was told to nobody who could hear it", logger)
        self._is_asking = False

    def _ask_again(self, loop: asyncio.AbstractEventLoop, question: _Question) -> None:
        if question.is_urgent:
            self._meanwhile()
            loop.call_soon(self._ask, loop)
        else:
            loop.call_later(REST_SECONDS, self._ask, loop)
