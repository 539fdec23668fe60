"""Events are asked about in their order, and whoever waits hears of them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from kv_transfer.polling import Event, EventQueue


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


def told(events: EventQueue, event: Event, *, is_urgent: bool = True) -> asyncio.Future[None]:
    """What is told of an event, as a future."""
    answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def tell(error: Exception | None) -> None:
        if error is None:
            answer.set_result(None)
        else:
            answer.set_exception(error)

    events.when(event, tell, is_urgent=is_urgent)
    return answer


@pytest.mark.parametrize("is_urgent", [True, False])
def test_an_event_is_asked_about_until_it_has_happened(is_urgent: bool) -> None:
    async def scenario() -> None:
        event = Happening(after=3)
        await told(EventQueue(), event, is_urgent=is_urgent)
        assert event.num_asked == 4

    asyncio.run(scenario())


def test_later_events_are_not_asked_about_before_their_turn() -> None:
    async def scenario() -> None:
        events = EventQueue()
        first, second = Happening(after=5), Happening(after=0)
        answers = [told(events, each) for each in (first, second)]
        while first.num_asked <= first.after:
            assert second.num_asked == 0
            await asyncio.sleep(0)
        await asyncio.gather(*answers)

    asyncio.run(scenario())


def test_nothing_is_asked_when_nobody_waits() -> None:
    async def scenario() -> None:
        events = EventQueue()
        event = Happening(after=0)
        await told(events, event)
        for _ in range(3):
            await asyncio.sleep(0)
        assert event.num_asked == 1
        await told(events, Happening(after=2))

    asyncio.run(scenario())


def test_a_device_that_fails_is_heard_of_and_the_next_event_still_asked_about() -> None:
    async def scenario() -> None:
        events = EventQueue()
        broken = told(events, Broken())
        whole = told(events, Happening(after=1))
        with pytest.raises(RuntimeError, match="gone"):
            await broken
        await whole

    asyncio.run(scenario())
