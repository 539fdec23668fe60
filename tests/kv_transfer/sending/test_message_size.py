"""A `Reserve` that its decode node does not take ends one hand-off, not the pairing."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tests.kv_twins import BLOCK_SIZE, make_request, twins, until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.kv_twins import DecodeSide, PrefillSide

MAX_BYTES = 1024
TABLE = [3]


def with_small_messages(scenario: Callable[[PrefillSide, DecodeSide], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(20), twins(max_message_bytes=MAX_BYTES) as (prefill, decode):
            await scenario(prefill, decode)

    asyncio.run(main())


async def fails_alone(prefill: PrefillSide, decode: DecodeSide) -> None:
    """Of two hand-offs the one with too long a prompt."""
    too_long, other = make_request(MAX_BYTES), make_request(BLOCK_SIZE)
    prefill.hand_off(decode, too_long)
    assert prefill.owner.of(too_long.sequence_id) == [], "whoever opens it does not have it yet"
    prefill.hand_off(decode, other)
    prefill.compute(other, TABLE)
    prefill.sender.commit(other.sequence_id, 7)
    await until(lambda: "free" in prefill.owner.of(other.sequence_id))
    assert prefill.owner.of(other.sequence_id) == ["committed", "free"]
    await until(lambda: "free" in prefill.owner.of(too_long.sequence_id))
    assert prefill.owner.of(too_long.sequence_id) == ["failed", "free"]
    assert prefill.owner.errors[too_long.sequence_id].code == "request_too_large"
    assert prefill.sender.agent.stats.pairings == 1


def test_what_waits_for_the_pairing_is_told_that_it_does_not_fit() -> None:
    with_small_messages(fails_alone)


def test_what_comes_after_the_pairing_is_told_that_it_does_not_fit() -> None:
    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        prefill.sender.pair(decode.node_id, decode.address)
        [peer] = prefill.sender._peers.values()
        await until(lambda: peer.is_ready)
        await fails_alone(prefill, decode)

    with_small_messages(scenario)
