"""Each order to a KV link does to the frame what it says, is told as done, and else nothing is."""

from __future__ import annotations

import asyncio
import gc
import os
import secrets
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from cluster.errors import ServingError
from kv_transfer.protocol import (
    CommitMessage,
    FrameHeader,
    FrameLimits,
    FrameMalformed,
    pack_commit,
    parse_header,
    parse_message,
    write_header,
)
from kv_transfer.transports.loopback import LoopbackNetwork, LoopbackTransport
from tests.faults.kv_link import Order, SpoiledTransport, shots_done, withdraw
from tests.faults.spoiled_bytes import Spoil, swap_ends
from tests.kv_twins import until

if TYPE_CHECKING:
    from pathlib import Path

    from kv_transfer.transports.base import Endpoint

UNIT_BYTES, NUM_UNITS = 64, 4
LIMITS = FrameLimits(NUM_UNITS, UNIT_BYTES, UNIT_BYTES * NUM_UNITS)
SESSION, NONCE = 5, 7
COMMIT = CommitMessage(transfer_id=bytes(16), epoch=1, nonce=NONCE, num_frames=1, first_token_id=3)
CUTS = (Spoil.CUT_BEFORE_HEADER, Spoil.CUT_BEFORE_PAYLOAD, Spoil.CUT_AFTER_PAYLOAD)


class Link:
    """A sender behind a spoiled transport, and what a receiver gets."""

    def __init__(self, folder: Path) -> None:
        network = LoopbackNetwork()
        self._receiver = LoopbackTransport(network)
        self._sender = SpoiledTransport(LoopbackTransport(network), str(folder))
        self._accepted: asyncio.Future[Endpoint] = asyncio.get_running_loop().create_future()

    async def open(self) -> None:
        port = await self._receiver.listen(
            "127.0.0.1", 0, lambda _, endpoint: self._accepted.set_result(endpoint)
        )
        self.near = await self._sender.connect("127.0.0.1", port, SESSION)
        self.far = await self._accepted

    def post(self, seq: int) -> asyncio.Future[tuple[BaseException | None, BaseException | None]]:
        """Send one frame; `frame_of(seq)` is what it holds."""
        header, payload = frame_of(seq)
        sends = (self.near.send(header, SESSION), self.near.send(payload, NONCE))
        return asyncio.gather(*sends, return_exceptions=True)

    async def receive(self) -> tuple[torch.Tensor, torch.Tensor]:
        header = torch.zeros(LIMITS.max_header_bytes, dtype=torch.uint8)
        payload = torch.zeros(LIMITS.max_payload_bytes, dtype=torch.uint8)
        async with asyncio.timeout(10):
            await self.far.recv(header, SESSION)
            await self.far.recv(payload, NONCE)
        return header, payload

    async def close(self) -> None:
        await self.near.close()
        await self._receiver.close()
        await self._sender.close()


def frame_of(seq: int) -> tuple[torch.Tensor, torch.Tensor]:
    payload = torch.arange(LIMITS.max_payload_bytes, dtype=torch.int64) + 31 * seq
    payload = payload.to(torch.uint8)
    header = FrameHeader(
        transfer_id=bytes(16),
        incarnation=1,
        epoch=1,
        nonce=NONCE,
        seq=seq,
        layer_start=0,
        num_layers=NUM_UNITS,
        positions=(0,),
        payload_bytes=payload.numel(),
    )
    out = np.zeros(LIMITS.max_header_bytes, dtype=np.uint8)
    length = write_header(header, out.data)
    return torch.from_numpy(out[:length]), payload


def seq_of(header: torch.Tensor) -> int:
    return parse_header(header.numpy().data, LIMITS).seq


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / secrets.token_hex(4)


def test_without_an_order_frames_pass_untouched_and_none_is_told(folder: Path) -> None:
    async def scenario() -> None:
        link = Link(folder)
        await link.open()
        for seq in range(3):
            ended = link.post(seq)
            header, payload = await link.receive()
            assert seq_of(header) == seq
            assert torch.equal(payload, frame_of(seq)[1])
            assert list(await ended) == [None, None]
        await link.close()

    asyncio.run(scenario())
    assert shots_done(folder) == 0


@pytest.mark.parametrize("spoil", [Spoil.FLIP, Spoil.SWAP, Spoil.STALE, Spoil.NAN, Spoil.TRUNCATE])
def test_a_spoiled_payload_differs_and_its_header_does_not(folder: Path, spoil: Spoil) -> None:
    async def scenario() -> None:
        link = Link(folder)
        await link.open()
        Order(spoil=spoil, skip=1).write(folder)
        for seq in range(3):
            link.post(seq)
            header, payload = await link.receive()
            assert seq_of(header) == seq
            assert torch.equal(payload, frame_of(seq)[1]) is (seq != 1)
        await link.close()

    asyncio.run(scenario())
    assert shots_done(folder) == 1


def test_units_that_change_places_take_their_digests_along() -> None:
    _, payload = frame_of(0)
    before = payload.clone()
    swap_ends(payload, NUM_UNITS)
    units, was = (each[: NUM_UNITS * UNIT_BYTES].view(NUM_UNITS, -1) for each in (payload, before))
    behind, were = (
        each[NUM_UNITS * UNIT_BYTES :].view(NUM_UNITS, -1) for each in (payload, before)
    )
    for now, then in ((units, was), (behind, were)):
        assert torch.equal(now, then[[3, 1, 2, 0]])


@pytest.mark.parametrize("spoil", [Spoil.FLIP_HEADER, Spoil.TRUNCATE_HEADER, Spoil.LIE])
def test_a_spoiled_header_cannot_be_read(folder: Path, spoil: Spoil) -> None:
    async def scenario() -> None:
        link = Link(folder)
        await link.open()
        Order(spoil=spoil).write(folder)
        link.post(0)
        header, payload = await link.receive()
        with pytest.raises(FrameMalformed, match="fit its map" if spoil is Spoil.LIE else None):
            seq_of(header)
        assert torch.equal(payload, frame_of(0)[1])
        await link.close()

    asyncio.run(scenario())
    assert shots_done(folder) == 1


@pytest.mark.parametrize("cut", CUTS)
def test_a_cut_ends_the_connection_and_every_send_on_it(folder: Path, cut: Spoil) -> None:
    async def scenario() -> None:
        link = Link(folder)
        await link.open()
        Order(spoil=cut).write(folder)
        receiving = asyncio.create_task(link.receive())
        results = await link.post(0)
        later = await link.post(1)
        assert all(isinstance(result, ServingError) for result in later)
        assert (list(results) == [None, None]) is (cut is Spoil.CUT_AFTER_PAYLOAD)
        with_result = await asyncio.gather(receiving, return_exceptions=True)
        assert isinstance(with_result[0], ServingError) is (cut is not Spoil.CUT_AFTER_PAYLOAD)
        await link.close()

    asyncio.run(scenario())
    assert shots_done(folder) == 1


def test_a_cut_is_told_even_if_the_owner_closes_the_link_while_it_is_cut(folder: Path) -> None:
    async def scenario() -> None:
        link = Link(folder)
        await link.open()
        inner = link.near._inner  # type: ignore[attr-defined]
        end = inner.close

        async def end_and_be_closed() -> bool:
            inner.close = end
            await end()
            await link.close()
            await asyncio.sleep(0)
            return True

        inner.close = end_and_be_closed
        Order(spoil=Spoil.CUT_BEFORE_PAYLOAD).write(folder)
        link.post(0)
        with pytest.raises(ServingError):
            await link.receive()

    asyncio.run(scenario())
    assert shots_done(folder) == 1


@pytest.mark.parametrize("spoil", [Spoil.DUPLICATE, Spoil.LATE])
def test_a_frame_comes_twice(folder: Path, spoil: Spoil) -> None:
    async def scenario() -> None:
        link = Link(folder)
        await link.open()
        Order(spoil=spoil, seconds=0.0).write(folder)
        link.post(0)
        link.post(1)
        seqs = [seq_of((await link.receive())[0]) for _ in range(3)]
        assert sorted(seqs) == [0, 0, 1]
        await link.close()

    asyncio.run(scenario())
    assert shots_done(folder) == 1


def test_two_frames_change_places(folder: Path) -> None:
    async def scenario() -> None:
        link = Link(folder)
        await link.open()
        Order(spoil=Spoil.REORDER).write(folder)
        link.post(0)
        link.post(1)
        assert [seq_of((await link.receive())[0]) for _ in range(2)] == [1, 0]
        await link.close()

    asyncio.run(scenario())


def test_a_last_frame_changes_places_with_its_commit(folder: Path) -> None:
    async def scenario() -> None:
        link = Link(folder)
        await link.open()
        Order(spoil=Spoil.REORDER).write(folder)
        held = link.post(0)
        commit = torch.frombuffer(bytearray(pack_commit(COMMIT)), dtype=torch.uint8)
        sent = link.near.send(commit, SESSION)
        header = torch.zeros(LIMITS.max_header_bytes, dtype=torch.uint8)
        async with asyncio.timeout(10):
            await link.far.recv(header, SESSION)
            await sent
        assert parse_message(header.numpy().data, LIMITS) == COMMIT
        assert seq_of((await link.receive())[0]) == 0
        assert list(await held) == [None, None]
        await link.close()

    asyncio.run(scenario())


def test_a_frame_that_is_held_back_ends_with_its_link_and_nobody_complains(folder: Path) -> None:
    async def scenario() -> None:
        complaints = []
        asyncio.get_running_loop().set_exception_handler(lambda _, told: complaints.append(told))
        link = Link(folder)
        await link.open()
        Order(spoil=Spoil.REORDER).write(folder)
        held = link.post(0)
        await until(lambda: shots_done(folder) > 0)
        Order(spoil=Spoil.CUT_BEFORE_HEADER).write(folder)
        os.utime(folder / "order", ns=(1, 1))  # another one, however coarse the clock of files
        for result in (*await link.post(1), *await held):
            assert isinstance(result, ServingError)
        await link.close()
        del held
        gc.collect()
        assert not complaints

    asyncio.run(scenario())


@pytest.mark.parametrize("spoil", [Spoil.DELAY, Spoil.RATE])
def test_what_is_held_up_keeps_its_order(folder: Path, spoil: Spoil) -> None:
    async def scenario() -> None:
        link = Link(folder)
        await link.open()
        Order(spoil=spoil, seconds=0.01, bytes_per_second=1e5).write(folder)
        link.post(0)
        link.post(1)
        assert [seq_of((await link.receive())[0]) for _ in range(2)] == [0, 1]
        await link.close()

    asyncio.run(scenario())
    assert shots_done(folder) == 1


def test_what_is_never_posted_ends_with_the_connection(folder: Path) -> None:
    async def scenario() -> None:
        link = Link(folder)
        await link.open()
        Order(spoil=Spoil.BLACKHOLE).write(folder)
        lost = link.post(0)
        link.post(1)
        assert seq_of((await link.receive())[0]) == 1
        assert not lost.done()
        await link.close()
        assert all(isinstance(result, ServingError) for result in await lost)

    asyncio.run(scenario())
    assert shots_done(folder) == 1


def test_a_link_that_swallows_says_of_all_that_it_was_sent(folder: Path) -> None:
    async def scenario() -> None:
        link = Link(folder)
        await link.open()
        assert await asyncio.gather(link.post(0), link.receive())
        Order(spoil=Spoil.SWALLOW).write(folder)
        receiving = asyncio.create_task(link.receive())
        assert list(await link.post(1)) == list(await link.post(2)) == [None, None]
        assert not receiving.done()
        await link.close()
        await asyncio.wait([receiving])
        assert isinstance(receiving.exception(), ServingError)

    asyncio.run(scenario())
    assert shots_done(folder) == 1


def test_an_order_that_was_taken_back_does_nothing(folder: Path) -> None:
    async def scenario() -> None:
        link = Link(folder)
        await link.open()
        Order(spoil=Spoil.FLIP, shots=100).write(folder)
        withdraw(folder)
        link.post(0)
        assert torch.equal((await link.receive())[1], frame_of(0)[1])
        await link.close()

    asyncio.run(scenario())
    assert shots_done(folder) == 0
