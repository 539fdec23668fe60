"""A rehearsal runs through everything, touches nobody's blocks, and harms nobody when it breaks."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
import torch

from kernels.launch import width_of_int
from kv_transfer import rehearsal as module
from kv_transfer.digests import digest_seed
from kv_transfer.polling import EventQueue
from kv_transfer.rehearsal import Rehearsal
from tests.kv_transfer.fake_streams import streams_do_all_at_once

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled in this process")
    streams_do_all_at_once(monkeypatch)
    shards = [torch.randint(0, 256, (3, 5, 64), dtype=torch.uint8) for _ in range(2)]
    before = [shard.clone() for shard in shards]
    yield shards
    assert all(map(torch.equal, shards, before)), "real blocks are left alone"


async def rounds(number: int) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


def test_each_half_is_played_to_its_end(
    pools: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(module, "EVERY_SECONDS", 0.0)
        rehearsal = Rehearsal(pools)
        rehearsal.arrive()  # nothing has departed, so that comes first
        await rounds(5)
        assert (rehearsal.num_departed, rehearsal.num_arrived) == (1, 0)
        for number in range(1, 4):
            for half in (rehearsal.arrive, rehearsal.depart):
                half()
                half()  # under way: nothing
                await rounds(5)
            assert (rehearsal.num_departed, rehearsal.num_arrived) == (1 + number, number)

    asyncio.run(scenario())


def test_its_kernels_are_those_of_real_hand_offs(pools: list[torch.Tensor]) -> None:
    """A seed of another width is another type, and compiled for in the middle of serving."""

    async def scenario() -> None:
        seed = Rehearsal(pools)._place.seal.seed
        assert width_of_int(seed) == width_of_int(digest_seed(bytes(range(16)), b"tenant"))

    asyncio.run(scenario())


def test_the_next_waits_for_its_time(
    pools: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(module, "EVERY_SECONDS", 100.0)
        rehearsal = Rehearsal(pools)
        rehearsal._ended_at = float("-inf")
        for _ in range(3):
            rehearsal.depart()
            await rounds(5)
        assert rehearsal.num_departed == 1

    asyncio.run(scenario())


def test_one_that_breaks_is_the_last_and_nobody_else_hears_of_it(
    pools: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        rehearsal = Rehearsal(pools)
        begun = []

        def broken(*_: object) -> None:
            begun.append(True)
            raise RuntimeError("the device is gone")

        monkeypatch.setattr(rehearsal._moves, "gather", broken)
        for _ in range(3):
            rehearsal.depart()
        assert len(begun) == 1

    asyncio.run(scenario())


def test_it_is_played_while_an_urgent_event_is_waited_for() -> None:
    class Happening:
        num_asked = 0

        def query(self) -> bool:
            self.num_asked += 1
            return self.num_asked > 3

    async def scenario() -> None:
        played: list[int] = []
        events = EventQueue(lambda: played.append(1))
        for is_urgent in (True, False):
            told = asyncio.get_running_loop().create_future()
            events.when(Happening(), told.set_result, is_urgent=is_urgent)
            assert await told is None
            assert len(played) == 3

    asyncio.run(scenario())
