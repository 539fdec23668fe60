"""Waiting, on the event loop, for what the device has done.

Life of a question
    1. `EventQueue.when(event)`: events of one stream, in the order they were recorded there.
    2. The oldest is asked about: in every round of the event loop while it is urgent, which keeps
       this thread busy for microseconds and answers at once; every millisecond while it is not.
    3. Its future gets done, and the next one is asked about.

A thread that waits for an event and then wakes the loop would take longer than most moves take.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Protocol

REST_SECONDS = 0.001  # what an event loop's timers can tell apart


class Event(Protocol):
    """A CUDA event, as far as it matters here."""

    def query(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class _Question:
    event: Event
    is_urgent: bool
    answer: asyncio.Future[None]


class EventQueue:
    """Used on one event loop."""

    def __init__(self) -> None:
        self._questions: deque[_Question] = deque()
        self._is_asking = False

    def when(self, event: Event, *, is_urgent: bool) -> asyncio.Future[None]:
        """Done when `event` has happened, and those given before it."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[None] = loop.create_future()
        self._questions.append(_Question(event, is_urgent, answer))
        if not self._is_asking:
            self._is_asking = True
            loop.call_soon(self._ask, loop)
        return answer

    def _ask(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._questions:
            question = self._questions[0]
            try:
                if not question.event.query():
                    self._ask_again(loop, question)
                    return
                if not question.answer.done():
                    question.answer.set_result(None)
            except Exception as error:  # the device's; whoever waits must hear of it
                if not question.answer.done():
                    question.answer.set_exception(error)
            self._questions.popleft()
        self._is_asking = False

    def _ask_again(self, loop: asyncio.AbstractEventLoop, question: _Question) -> None:
        if question.is_urgent:
            loop.call_soon(self._ask, loop)
        else:
            loop.call_later(REST_SECONDS, self._ask, loop)
