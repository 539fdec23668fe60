"""Frames that wait for the pace while the decode node decodes: a read a second, by its clock."""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING

import torch

from kv_transfer.receiving.read_pace import ReadPace
from tests.kv_transfer.catalogue_worlds import TABLE, Gate
from tests.kv_transfer.test_mapped_slots import World, world
from tests.kv_twins import NUM_BLOCKS, until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import pytest

NUM_FRAMES = 3 * 8
UNIT_BYTES = 4096  # a slot's: each unit is a frame, and three of four slots are one peer's


class Decoding:
    def __init__(self) -> None:
        self.goes_on = True

    def __call__(self) -> bool:
        return self.goes_on


def run(
    monkeypatch: pytest.MonkeyPatch,
    scenario: Callable[[World, Gate, Decoding], Awaitable[None]],
    *,
    patience_seconds: float = 1e9,
) -> None:
    async def main() -> None:
        decoding = Decoding()
        async with world(monkeypatch, unit_bytes=UNIT_BYTES, is_decoding=decoding) as here:
            receiver = here.decode.receiver
            receiver._reads._pace = ReadPace(UNIT_BYTES + 8, patience_seconds=patience_seconds)
            gate = Gate()
            gate.opened.set()
            pool = receiver.agent.pool
            monkeypatch.setattr(pool, "begin_scatter", gate.around(pool.begin_scatter))
            await scenario(here, gate, decoding)

    asyncio.run(main())


async def held_back(here: World, gate: Gate) -> None:
    """One has begun, and as many as there are slots wait."""
    stats = here.decode.receiver.agent.stats
    await until(lambda: stats.reads_held_back == 3)
    assert len(gate.begun) == 1
    assert here.staging.num_free == here.staging.num_slots - 3


def test_reads_begin_as_their_time_comes_and_the_last_layer_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(here: World, gate: Gate, decoding: Decoding) -> None:
        def has_begun(number: int) -> bool:
            return len(gate.begun) >= number

        request = here.hand_off()
        await held_back(here, gate)
        for num_begun in range(1, NUM_FRAMES - 3):
            assert len(gate.begun) == num_begun
            here.decode.clock.advance(1.0)
            await until(functools.partial(has_begun, num_begun + 1))
            await asyncio.sleep(0.002)
        assert await here.ended(request) == ["committed", "free"]
        assert len(gate.begun) == NUM_FRAMES
        taken = list(here.decode.source.owned[request.sequence_id])
        assert torch.equal(here.decode.pool[:, taken], here.prefill.pool[:, TABLE])

    run(monkeypatch, scenario)


def test_what_waits_goes_when_nothing_is_decoded_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(here: World, gate: Gate, decoding: Decoding) -> None:
        request = here.hand_off()
        await held_back(here, gate)
        decoding.goes_on = False
        assert await here.ended(request) == ["committed", "free"]
        assert here.decode.receiver.agent.stats.reads_held_back == 3

    run(monkeypatch, scenario)


def test_what_waits_is_dropped_unread_when_its_sequence_is_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(here: World, gate: Gate, decoding: Decoding) -> None:
        request = here.hand_off(commits=False)
        await held_back(here, gate)
        here.decode.receiver.cancel(request.sequence_id)
        assert "free" in await here.ended(request)
        await until(lambda: len(here.decode.source.free) == NUM_BLOCKS)
        await until(lambda: here.staging.num_free == here.staging.num_slots)
        assert len(gate.begun) == 1

    run(monkeypatch, scenario)


def test_blocks_come_back_when_the_link_ends_while_frames_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(here: World, gate: Gate, decoding: Decoding) -> None:
        request = here.hand_off()
        await held_back(here, gate)
        [peer] = here.prefill.sender._peers.values()
        peer.cut()
        assert await here.ended(request) == ["failed", "free"]
        await until(lambda: len(here.decode.source.free) == NUM_BLOCKS)
        assert len(gate.begun) == 1
        assert here.staging.num_free == here.staging.num_slots

    run(monkeypatch, scenario)


def test_a_pace_that_would_take_for_ever_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """No timer of a transfer may mistake it for a stall."""

    async def scenario(here: World, gate: Gate, decoding: Decoding) -> None:
        request = here.hand_off()
        await held_back(here, gate)
        while not here.prefill.owner.of(request.sequence_id):
            here.decode.clock.advance(0.25)
            here.decode.receiver.sweep()
            await asyncio.sleep(0.012)
        assert await here.ended(request) == ["committed", "free"]

    run(monkeypatch, scenario, patience_seconds=0.25)
