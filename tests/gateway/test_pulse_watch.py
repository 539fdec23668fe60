"""A watch on real sockets: of a real gRPC server, and of one that accepts and says nothing."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from cluster.clock import monotonic
from cluster.rpc import bind, create_server
from gateway import pulse_watch
from gateway.http2_pings import GREETING
from gateway.pulse import Pulse
from gateway.pulse_watch import PulseWatch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

SOON_SECONDS = 20.0  # a bound for hanging, not a measure


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse_watch, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(pulse_watch, "PAUSE_SECONDS", 0.01)


class Peer:
    """Accepts, reads, and answers as `reply` says."""

    def __init__(self, reply: Callable[[bytes], bytes] = lambda data: b"") -> None:
        self.num_connections = 0
        self.received = b""
        self.closes = False
        self.has_input = asyncio.Event()
        self.has_closed = asyncio.Event()
        self._reply = reply

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        with contextlib.suppress(ConnectionError):
            while not self.closes and (data := await reader.read(4096)):
                self.received += data
                self.has_input.set()
                writer.write(self._reply(data))
        writer.close()
        self.has_closed.set()


@contextlib.asynccontextmanager
async def served(peer: Peer) -> AsyncIterator[str]:
    server = await asyncio.start_server(peer.serve, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


def watch(address: str, *, timeout: float = 0.05) -> PulseWatch:
    return PulseWatch(address, timeout=timeout, is_urgent=lambda: True, clock=monotonic)


@pytest.mark.usefixtures("_quick")
def test_a_peer_that_accepts_and_answers_nothing_is_silent_and_is_let_go() -> None:
    async def scenario() -> None:
        peer = Peer()
        async with served(peer) as address:
            await asyncio.wait_for(watch(address).until_silent(), SOON_SECONDS)
            await asyncio.wait_for(peer.has_closed.wait(), SOON_SECONDS)
        assert peer.received.startswith(GREETING)

    asyncio.run(scenario())


def test_a_server_of_ours_answers_as_often_as_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    answered: list[int] = []
    has_enough = asyncio.Event()

    def answer(pulse: Pulse, number: int, now: float) -> None:
        answered.append(number)
        if len(answered) == 8:
            has_enough.set()

    async def scenario() -> None:
        server = create_server()
        port = bind(server, "127.0.0.1", 0)
        await server.start()
        monkeypatch.setattr(Pulse, "answered", answer)
        watching = asyncio.create_task(watch(f"127.0.0.1:{port}", timeout=60.0).until_silent())
        await asyncio.wait_for(has_enough.wait(), SOON_SECONDS)
        watching.cancel()
        await server.stop(None)

    asyncio.run(scenario())
    assert answered == list(range(1, 9))


@pytest.mark.usefixtures("_quick")
def test_a_connection_that_ends_is_opened_again_and_blames_nobody() -> None:
    async def scenario() -> None:
        peer = Peer()
        peer.closes = True
        async with served(peer) as address:
            watching = asyncio.create_task(watch(address).until_silent())
            while peer.num_connections < 3:
                assert not watching.done()
                await asyncio.sleep(0.01)
            peer.closes = False
            await asyncio.wait_for(watching, SOON_SECONDS)

    asyncio.run(scenario())


def test_a_peer_that_refuses_pings_is_asked_once_and_never_silent(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        goaway = b"\0\0\x08\7\0\0\0\0\0" + bytes(7) + b"\x0b"
        peer = Peer(reply=lambda _: goaway)
        async with served(peer) as address:
            watching = asyncio.create_task(watch(address).until_silent())
            while "takes no pings" not in caplog.text:  # noqa: ASYNC110 - a log has no event
                await asyncio.sleep(0.01)
            assert not watching.done()
            watching.cancel()
        assert peer.num_connections == 1

    caplog.set_level("INFO")
    asyncio.run(scenario())


@pytest.mark.usefixtures("_quick")
def test_nobody_at_the_address_is_no_silence() -> None:
    class Counting(PulseWatch):
        num_attempts = 0
        has_tried = asyncio.Event()

        async def _connect(self) -> Any:
            link = await super()._connect()
            assert link is None
            self.num_attempts += 1
            if self.num_attempts == 3:
                self.has_tried.set()
            return link

    async def scenario() -> None:
        async with served(Peer()) as address:
            pass
        nobody = Counting(address, timeout=0.05, is_urgent=lambda: True, clock=monotonic)
        watching = asyncio.create_task(nobody.until_silent())
        await asyncio.wait_for(nobody.has_tried.wait(), SOON_SECONDS)
        assert not watching.done()
        watching.cancel()

    asyncio.run(scenario())
