"""Events are asked about in their order, and whoever waits hears of them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from kv_transfer.polling import EventQueue


@dataclass
class Happening:
    """Happens after it was asked about so often."""

    after: int
    num_asked: int = 0

    def query(self) -> bool:
        self.num_asked += 1
        return self.num_asked > self.after


class Broken:
    def query(self) -> bool:
        raise RuntimeError("the device is gone")


@pytest.mark.parametrize("is_urgent", [True, False])
def test_an_event_is_asked_about_until_it_has_happened(is_urgent: bool) -> None:
    async def scenario() -> None:
        event = Happening(after=3)
        await EventQueue().when(event, is_urgent=is_urgent)
        assert event.num_asked == 4

    asyncio.run(scenario())


def test_later_events_are_not_asked_about_before_their_turn() -> None:
    async def scenario() -> None:
        events = EventQueue()
        first, second = Happening(after=5), Happening(after=0)
        answers = [events.when(each, is_urgent=True) for each in (first, second)]
        while not answers[0].done():
            assert second.num_asked == 0
            await asyncio.sleep(0)
        await answers[1]

    asyncio.run(scenario())


def test_nothing_is_asked_when_nobody_waits() -> None:
    async def scenario() -> None:
        events = EventQueue()
        event = Happening(after=0)
        await events.when(event, is_urgent=True)
        for _ in range(3):
            await asyncio.sleep(0)
        assert event.num_asked == 1
        await events.when(Happening(after=2), is_urgent=True)

    asyncio.run(scenario())


def test_a_device_that_fails_is_heard_of_and_the_next_event_still_asked_about() -> None:
    async def scenario() -> None:
        events = EventQueue()
        broken = events.when(Broken(), is_urgent=True)
        whole = events.when(Happening(after=1), is_urgent=True)
        with pytest.raises(RuntimeError, match="gone"):
            await broken
        await whole

    asyncio.run(scenario())


def test_who_stopped_waiting_does_not_stop_the_others() -> None:
    async def scenario() -> None:
        events = EventQueue()
        one, other = Happening(after=2), Happening(after=0)
        left = events.when(one, is_urgent=True)
        stayed = events.when(other, is_urgent=True)
        left.cancel()
        await stayed

    asyncio.run(scenario())
