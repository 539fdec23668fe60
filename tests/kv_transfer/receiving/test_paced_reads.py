"""The timer of paced reads outlives what breaks in a read."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from kv_transfer.receiving.paced_reads import PacedReads
from kv_transfer.receiving.read_pace import ReadPace
from kv_transfer.stats import TransferStats
from tests.kv_twins import ManualClock, until

if TYPE_CHECKING:
    from collections.abc import Callable

RATE = 1000.0


class World:
    """A pace that lets one read of `RATE` bytes begin each second, by a clock that stands still."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.unwanted: set[bytes] = set()
        self.log: list[str] = []
        self.reads = PacedReads(
            ReadPace(RATE, patience_seconds=1000.0),
            is_wanted=lambda transfer_id: transfer_id not in self.unwanted,
            is_decoding=lambda: True,
            clock=self.clock,
            stats=TransferStats(),
        )

    def ask(self, name: str, *, breaks: bool = False) -> None:
        def note(what: str) -> Callable[[], None]:
            def call() -> None:
                self.log.append(f"{what} {name}")
                if breaks:
                    raise RuntimeError("nobody foresaw this")

            return call

        self.reads.begin(name.encode(), int(RATE), note("begin"), note("drop"), is_awaited=False)


def test_a_read_that_breaks_does_not_keep_those_behind_it_waiting() -> None:
    async def main() -> None:
        world = World()
        world.ask("first")
        world.ask("broken", breaks=True)
        world.ask("next")
        assert world.log == ["begin first"]
        world.clock.advance(10.0)
        await until(lambda: "begin broken" in world.log)
        world.clock.advance(10.0)
        await until(lambda: "begin next" in world.log)
        assert world.log == ["begin first", "begin broken", "begin next"]

    asyncio.run(main())


def test_a_read_that_breaks_as_it_is_dropped_does_not_stop_the_timer() -> None:
    async def main() -> None:
        world = World()
        world.ask("first")
        world.ask("broken", breaks=True)
        world.ask("next")
        world.unwanted.add(b"broken")
        await until(lambda: "drop broken" in world.log)
        world.clock.advance(10.0)
        await until(lambda: "begin next" in world.log)

    asyncio.run(main())
