"""Bugs that others had with leases, timers, and nodes that come and go.

Each test names the reports it comes from; see `test_bug_catalogue.py`.
"""

from __future__ import annotations

import asyncio

import pytest

from kv_transfer.lease import LeaseTable
from kv_transfer.transports.loopback import LoopbackNetwork, LoopbackTransport
from tests.kv_faults import HandDriven, hand_driven, two_frames
from tests.kv_transfer.catalogue_worlds import TABLE, stop_timers, with_pair, with_peer
from tests.kv_twins import (
    BLOCK_SIZE,
    DecodeSide,
    PrefillSide,
    decode_side,
    make_pool,
    make_request,
    prefill_side,
    until,
)


def test_a_sweep_reaches_expired_leases_behind_a_live_one() -> None:
    """vllm#58222: the reaper stopped at the first live entry."""
    leases = LeaseTable(30.0)
    for lease_id in (b"a", b"b", b"c"):
        leases.grant(lease_id, now=0.0)
    leases.renew(b"a", 30.0, now=20.0)
    assert leases.expire(30.0) == [b"b", b"c"]


def test_a_renewal_that_is_pushed_keeps_the_sources() -> None:
    """vllm#53095: heartbeats of the pushing kind did not renew."""

    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        stop_timers(prefill, decode)
        decode.source.may_reserve.clear()  # from admission on, not from when it is scheduled
        request = make_request(30)
        prefill.hand_off(decode, request)
        await until(lambda: decode.receiver.num_transfers == 1)
        for _ in range(3):
            prefill.clock.advance(15.0)
            decode.clock.advance(15.0)
            decode.receiver.sweep()
            await until(lambda: prefill.sender.leases()[0].expires_in_seconds > 15.0, seconds=3)
            prefill.sender.sweep()
            await until(lambda: decode.receiver.leases()[0].expires_in_seconds > 15.0, seconds=3)
        prefill.sender.abort(request.sequence_id)
        decode.source.may_reserve.set()

    with_pair(scenario)


@pytest.mark.parametrize("end", ["prefill", "decode"])
def test_what_has_run_out_is_cleaned_up_with_no_new_work(end: str) -> None:
    """trt#12313: cleaning up waited for the next request."""

    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        request = make_request(30)
        name = request.sequence_id
        prefill.hand_off(decode, request)
        await until(lambda: decode.source.of(name) == ["reserved"])
        if end == "decode":
            stop_timers(prefill, None)
            decode.clock.advance(30.0)
            await until(lambda: "failed" in decode.source.of(name), seconds=5)
        else:
            stop_timers(None, decode)
            prefill.clock.advance(30.0)
            await until(lambda: "failed" in prefill.owner.of(name), seconds=5)

    with_pair(scenario)


def test_a_decode_node_that_was_lost_once_is_used_again() -> None:
    """sgl#13054: a transient error blacklisted for ever."""

    async def main() -> None:
        network = LoopbackNetwork()
        async with (
            decode_side(LoopbackTransport(network)) as decode,
            prefill_side(LoopbackTransport(network)) as prefill,
        ):
            for expected in ("failed", "committed"):
                request = make_request(30)
                name = request.sequence_id
                prefill.hand_off(decode, request)
                await until(lambda name=name: decode.source.of(name) == ["reserved"])  # type: ignore[misc]
                if expected == "failed":
                    prefill.sender._peers[decode.node_id].cut()
                else:
                    prefill.compute(request, TABLE)
                    prefill.sender.commit(name, 1)
                await until(
                    lambda name=name, expected=expected: (  # type: ignore[misc]
                        prefill.owner.of(name) == [expected, "free"]
                    ),
                    seconds=5,
                )

    asyncio.run(main())


def test_the_death_of_one_prefill_node_is_nothing_to_another() -> None:
    """sgl#12779: it failed the decode node."""

    async def main() -> None:
        network = LoopbackNetwork()
        async with (
            decode_side(LoopbackTransport(network)) as decode,
            hand_driven(network, decode, make_pool(1), name="p1") as living,
        ):
            ticket, frames = await two_frames(living, make_request(2 * BLOCK_SIZE))
            lost = make_request(2 * BLOCK_SIZE)
            async with hand_driven(network, decode, make_pool(1), name="p2") as dying:
                await two_frames(dying, lost)
            await until(lambda: lost.sequence_id not in decode.source.owned, seconds=5)
            for header, payload in frames:
                await living.post(header, payload)
            living.commit(ticket, num_frames=2)
            assert not (await living.next("committed")).committed.HasField("error")

    asyncio.run(main())


def test_a_dead_peer_leaves_no_connection_behind() -> None:
    """vllm#58063: its memory stayed mapped, 67 GiB per GPU."""

    async def scenario(peer: HandDriven, decode: DecodeSide) -> None:
        [session] = decode.receiver._sessions
        closed = asyncio.Event()
        await until(lambda: session.is_connected)
        assert session._endpoint is not None
        session._endpoint.on_close(closed.set)
        await peer.stream.close()
        await asyncio.wait_for(closed.wait(), 5)
        await until(lambda: decode.receiver.num_sessions == 0, seconds=5)
        assert not decode.receiver.agent._in_use

    with_peer(scenario)
