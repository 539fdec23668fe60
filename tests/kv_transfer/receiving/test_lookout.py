"""The loop goes round while more is about to come, and else it sleeps."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from kv_transfer.receiving import lookout
from kv_transfer.receiving.lookout import Lookout

if TYPE_CHECKING:
    import pytest


class Node:
    is_decoding = False


async def rounds(number: int) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


def test_it_stays_awake_until_it_may_rest() -> None:
    async def scenario() -> None:
        looking = Lookout(lambda: False)
        looking.stay()
        await rounds(5)
        assert looking._is_awake
        looking.rest()
        await rounds(2)
        assert not looking._is_awake
        looking.stay()
        await rounds(5)
        assert looking._is_awake
        looking.rest()

    asyncio.run(scenario())


def test_it_does_not_stay_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(lookout, "STAY_SECONDS", 0.0)
        looking = Lookout(lambda: False)
        looking.stay()
        await rounds(2)
        assert not looking._is_awake

    asyncio.run(scenario())


def test_while_anything_is_decoded_it_sleeps() -> None:
    async def scenario() -> None:
        node = Node()
        looking = Lookout(lambda: node.is_decoding)
        looking.stay()
        await rounds(5)
        node.is_decoding = True
        await rounds(2)
        assert not looking._is_awake
        looking.stay()
        await rounds(2)
        assert not looking._is_awake

    asyncio.run(scenario())


def test_what_is_about_to_come_is_rehearsed_when_the_frame_itself_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        played: list[bool] = []
        looking = Lookout(lambda: False, lambda: played.append(True))
        monkeypatch.setattr(lookout, "REHEARSE_AFTER_SECONDS", 100.0)
        looking.stay()
        await rounds(5)
        assert not played
        monkeypatch.setattr(lookout, "REHEARSE_AFTER_SECONDS", 0.0)
        await rounds(5)
        assert played
        looking.rest()

    asyncio.run(scenario())


def test_the_launch_of_a_first_step_is_rehearsed_when_a_frame_is_placed_and_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        node, played = Node(), []
        looking = Lookout(lambda: node.is_decoding, rehearse_start=lambda: played.append(looking))
        monkeypatch.setattr(lookout, "START_EVERY_SECONDS", 100.0)
        looking.placed()
        assert len(played) == 1
        looking.stay()
        await rounds(5)
        assert len(played) == 1, "it was a moment ago"
        monkeypatch.setattr(lookout, "START_EVERY_SECONDS", 0.0)
        await rounds(5)
        assert len(played) > 1
        looking.rest()
        await rounds(2)
        played.clear()
        node.is_decoding = True
        looking.placed()
        assert not played, "whoever decodes has it at hand"

    asyncio.run(scenario())
