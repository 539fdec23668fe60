"""A peer that sends without end, or reads nothing, ends its own session before it fills the memory
of the node."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from cluster.errors import Overloaded
from cluster.node import NodeId, NodeName, new_incarnation
from cluster.rpc import open_channel
from kv_transfer.sending.kv_session import KvSessionStream, reserve_frame
from kv_transfer.transports.loopback import LoopbackNetwork, LoopbackTransport
from tests.kv_faults import HandDriven, two_frames
from tests.kv_transfer.catalogue_worlds import with_peer
from tests.kv_twins import (
    BLOCK_SIZE,
    COMPATIBLE,
    DecodeSide,
    decode_side,
    handoff_to,
    make_request,
    until,
)

if TYPE_CHECKING:
    from kv_transfer.protocol import FrameHeader

MAX_DRAINING = MAX_UNREAD = 16
PEER = NodeId(NodeName("p0"), new_incarnation())


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    session = "kv_transfer.receiving.receiver_session"
    monkeypatch.setattr(f"{session}.MAX_DRAINING", MAX_DRAINING)
    monkeypatch.setattr(f"{session}.MAX_UNREAD", MAX_UNREAD)


def stray(header: FrameHeader) -> FrameHeader:
    """Of no transfer that was ever reserved."""
    return replace(header, transfer_id=secrets.token_bytes(16), nonce=secrets.randbits(64))


def test_headers_whose_payloads_never_come_end_the_session() -> None:
    async def scenario(peer: HandDriven, decode: DecodeSide) -> None:
        request = make_request(2 * BLOCK_SIZE)
        _, frames = await two_frames(peer, request)
        header, _ = frames[0]
        sends = [peer.post_header(stray(header)) for _ in range(2 * MAX_DRAINING)]
        await until(lambda: peer.is_ended)
        await asyncio.gather(*sends, return_exceptions=True)
        dropped = decode.receiver.agent.stats.frames_dropped["ticket_invalid"]
        assert dropped == MAX_DRAINING + 1
        assert decode.source.of(request.sequence_id) == ["reserved", "failed", "released"]

    with_peer(scenario)


def test_stray_frames_that_come_whole_are_no_reason_to_end_a_session() -> None:
    async def scenario(peer: HandDriven, decode: DecodeSide) -> None:
        request = make_request(2 * BLOCK_SIZE)
        ticket, frames = await two_frames(peer, request)
        header, payload = frames[0]
        for _ in range(2 * MAX_DRAINING):
            await peer.post(stray(header), payload)
        for header, payload in frames:
            await peer.post(header, payload)
        peer.commit(ticket, num_frames=2)
        committed = (await peer.next("committed")).committed
        assert not committed.HasField("error")

    with_peer(scenario)


def test_a_peer_that_asks_and_reads_no_answers_is_cut_off() -> None:
    async def scenario() -> None:
        network = LoopbackNetwork()
        async with decode_side(LoopbackTransport(network)) as decode:
            decode.source.refusal = Overloaded("The pool is too small. " * 100)
            channel = open_channel(decode.address)
            stream = await KvSessionStream.open(
                channel, node_id=PEER, ours=COMPATIBLE, expected=decode.node_id
            )
            asks = asyncio.create_task(ask_on_and_on(stream, decode))
            await until(lambda: decode.receiver.num_sessions == 0)
            asks.cancel()
            await stream.close()
            await channel.close()

    asyncio.run(scenario())


async def ask_on_and_on(stream: KvSessionStream, decode: DecodeSide) -> None:
    while True:
        stream.send(reserve_frame(make_request(BLOCK_SIZE), handoff_to(decode)))
        await asyncio.sleep(0)
