"""The witness in a node sees what it must: where a protection is taken out, it objects."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from engine.block_manager import BlockManager
from engine.lent_blocks import LentBlocks
from engine.sequence import Sequence
from kv_transfer.pool import TransferPool
from kv_transfer.receiving.arrivals import PiecesArrival
from kv_transfer.receiving.incoming import BlockProgress, IncomingTransfer
from kv_transfer.receiving.receiver import KVReceiver
from kv_transfer.transports.tcp import TcpTransport
from tests.faults.history import History
from tests.faults.watched_node import watch
from tests.faults.witness import Evidence
from tests.kv_faults import HandDriven, two_frames
from tests.kv_transfer.catalogue_worlds import TABLE, with_pair, with_peer
from tests.kv_transfer.test_plain_tcp_hand_off import needs_xxhash
from tests.kv_twins import (
    BLOCK_SIZE,
    DecodeSide,
    PrefillSide,
    decode_side,
    make_request,
    prefill_side,
    until,
)
from tests.sequences import ROOT, compute
from tests.sequences import make_request as make_prompt

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

WRAPPED = {
    KVReceiver: ("_execute", "frame_arrived", "commit_arrived"),
    TransferPool: ("begin_scatter",),
    PiecesArrival: ("receive", "place"),
    BlockManager: ("_allocate_first", "mark_computed", "free"),
    LentBlocks: ("cache", "hand_over"),
}


class Watched:
    """What is built in this test is watched."""

    def __init__(self, folder: Path) -> None:
        watch(folder)
        self._evidence = Evidence({"node": folder})

    def events(self, kind: str) -> list[str]:
        history = History()
        self._evidence.take(history)
        return [event.detail for event in history.events if event.kind == kind]

    @property
    def looked(self) -> set[str]:
        return self._evidence.looked


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    for each, names in WRAPPED.items():
        for name in names:
            monkeypatch.setattr(each, name, getattr(each, name))  # as it is, once the test is over
    return Watched(tmp_path)


def test_a_hand_off_as_it_should_be_is_looked_at_and_not_objected_to(watched: Watched) -> None:
    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        request = make_request(30)
        prefill.hand_off(decode, request)
        prefill.compute(request, TABLE)
        prefill.sender.commit(request.sequence_id, 7)
        await until(lambda: "free" in prefill.owner.of(request.sequence_id))

    with_pair(scenario)
    assert watched.events("contradiction") == []
    assert watched.looked == {"I3", "I7"}


def test_a_start_from_blocks_that_nobody_verified_is_seen(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BlockProgress, "is_complete", True)

    async def scenario(peer: HandDriven, decode: DecodeSide) -> None:
        request = make_request(2 * BLOCK_SIZE)
        ticket, frames = await two_frames(peer, request)
        await peer.post(*frames[0])
        peer.commit(ticket, num_frames=1)
        await until(lambda: "started" in decode.source.of(request.sequence_id))

    with_peer(scenario)
    assert watched.events("contradiction") == ["node: I3, block 1 has 0 verified layers"]


def test_a_frame_that_is_taken_without_its_ticket_is_seen(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(IncomingTransfer, "why_not_ours", lambda *_: None)

    async def scenario(peer: HandDriven, decode: DecodeSide) -> None:
        request = make_request(2 * BLOCK_SIZE)
        _, frames = await two_frames(peer, request)
        header, payload = frames[0]
        await peer.post(replace(header, epoch=header.epoch + 2), payload)
        await until(lambda: decode.receiver.agent.stats.frames == 1)

    with_peer(scenario)
    assert watched.events("contradiction") == ["node: I7, a frame of no current ticket"]


def test_blocks_that_are_given_back_while_they_are_written_are_seen(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(IncomingTransfer, "is_quiescent", True)
    moves: list[asyncio.Future[bool]] = []

    def begin(*_: object) -> asyncio.Future[bool]:
        moves.append(asyncio.get_running_loop().create_future())
        return moves[-1]

    async def scenario(peer: HandDriven, decode: DecodeSide) -> None:
        request = make_request(2 * BLOCK_SIZE)
        _, frames = await two_frames(peer, request)
        monkeypatch.setattr(TransferPool, "_begin", begin)
        await peer.post(*frames[0])
        await until(lambda: bool(moves))
        decode.receiver.cancel(request.sequence_id)
        moves[0].set_result(True)

    with_peer(scenario)
    problem = "node: I7, blocks are given back while they are written"
    assert watched.events("contradiction") == [problem]


@asynccontextmanager
async def over_plain_tcp() -> AsyncIterator[tuple[PrefillSide, DecodeSide]]:
    def plain() -> TcpTransport:
        return TcpTransport(connect_seconds=5.0)

    async with decode_side(plain()) as decode, prefill_side(plain()) as prefill:
        yield prefill, decode


@needs_xxhash
def test_cancels_while_blocks_are_received_where_they_are_are_not_objected_to(
    watched: Watched,
) -> None:
    async def scenario() -> None:
        async with over_plain_tcp() as (prefill, decode):
            for number in range(40):
                request = make_request(30)
                prefill.hand_off(decode, request)
                prefill.compute(request, TABLE)
                for _ in range(number):
                    await asyncio.sleep(0)
                decode.receiver.cancel(request.sequence_id)
                prefill.sender.abort(request.sequence_id)
                await until(lambda: not prefill.sender.num_transfers)
                await until(lambda: not decode.receiver.num_transfers)

    asyncio.run(scenario())
    assert watched.events("contradiction") == []


@needs_xxhash
def test_a_receive_into_blocks_that_are_given_back_is_seen(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(IncomingTransfer, "is_quiescent", True)
    receives: list[asyncio.Future[None]] = []

    def receive(*_: object) -> asyncio.Future[None]:
        """Of a payload."""
        receives.append(asyncio.get_running_loop().create_future())
        return receives[-1]

    async def scenario() -> None:
        async with over_plain_tcp() as (prefill, decode):
            request = make_request(30)
            prefill.hand_off(decode, request)
            await until(lambda: decode.source.of(request.sequence_id) == ["reserved"])
            [session] = decode.receiver._sessions
            session._pieces = cast("Any", SimpleNamespace(recv_pieces=receive))
            prefill.compute(request, TABLE)
            await until(lambda: bool(receives))
            decode.receiver.cancel(request.sequence_id)
            receives[0].set_result(None)
            prefill.sender.abort(request.sequence_id)

    asyncio.run(scenario())
    problem = "node: I7, blocks are given back while they are written"
    assert watched.events("contradiction") == [problem]


def test_a_tenant_that_hits_a_block_of_another_is_seen(watched: Watched) -> None:
    """Their prompts have one root, as if a salt did not count."""
    manager = BlockManager(8, BLOCK_SIZE)
    for salt in (b"one", b"one", b"other"):
        request = replace(make_prompt(range(2 * BLOCK_SIZE + 1)), cache_salt=salt)
        sequence = Sequence(request, block_size=BLOCK_SIZE, root=ROOT)
        assert compute(manager, sequence)
        manager.free(sequence)
    wrong = ["node: I5, b'other' reads a block of b'one'"] * 2
    assert watched.events("contradiction") == wrong
    assert watched.looked == {"I5"}


def test_who_holds_blocks_and_gives_them_back_is_told(watched: Watched) -> None:
    manager = BlockManager(8, BLOCK_SIZE)
    request = make_prompt(range(9))
    sequence = Sequence(request, block_size=BLOCK_SIZE, root=ROOT)
    compute(manager, sequence)
    assert watched.events("held") == [f"{request.request_id} node"]
    manager.free(sequence)
    assert watched.events("freed") == [f"{request.request_id} node"]
