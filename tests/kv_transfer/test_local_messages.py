"""Messages between two processes of one machine: in order, apart, and heard until the end."""

from __future__ import annotations

import asyncio
import errno
import socket
from contextlib import asynccontextmanager
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from cluster.errors import TransferFailed
from kv_transfer.transports.local_messages import LocalListener, LocalMessages, connect
from tests.kv_twins import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

SESSION, MAX_BYTES = 2**64 - 5, 4096


class World:
    def __init__(self, hello_seconds: float) -> None:
        self.accepted: list[tuple[int, LocalMessages]] = []
        self.listener = LocalListener(
            lambda *named: self.accepted.append(named),
            max_bytes=MAX_BYTES,
            hello_seconds=hello_seconds,
        )

    async def pair(self) -> tuple[LocalMessages, LocalMessages]:
        ours = await connect(self.listener.name, SESSION, max_bytes=MAX_BYTES)
        await until(lambda: bool(self.accepted))
        session_id, theirs = self.accepted.pop()
        assert session_id == SESSION
        return ours, theirs

    def dial(self) -> socket.socket:
        """A connection of somebody else."""
        stranger = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stranger.connect(self.listener.name)
        stranger.setblocking(False)
        return stranger


@asynccontextmanager
async def world(hello_seconds: float) -> AsyncIterator[World]:
    here = World(hello_seconds)
    try:
        yield here
    finally:
        here.listener.close()


def run(scenario: Callable[[World], Awaitable[None]], hello_seconds: float = 5.0) -> None:
    async def main() -> None:
        async with world(hello_seconds) as here:
            await scenario(here)

    asyncio.run(main())


def heard_by(messages: LocalMessages) -> list[bytes]:
    heard: list[bytes] = []
    messages.listen(lambda message: heard.append(bytes(message)))
    return heard


def has(heard: list[bytes], number: int) -> bool:
    return len(heard) == number


def is_cut(stranger: socket.socket) -> bool:
    try:
        return stranger.recv(10) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def test_messages_of_both_directions_stay_apart_and_in_order() -> None:
    async def scenario(here: World) -> None:
        ours, theirs = await here.pair()
        for end, other in ((ours, theirs), (theirs, ours)):
            heard = heard_by(other)
            sent = [bytes([number]) * (1 + number) for number in range(5)]
            for message in sent:
                end.send(message)
            await until(partial(has, heard, 5))
            assert heard == sent
        ours.close()
        theirs.close()

    run(scenario)


def test_what_finds_no_room_follows_when_there_is_some() -> None:
    async def scenario(here: World) -> None:
        ours, theirs = await here.pair()
        sent = [number.to_bytes(4, "little") * 1000 for number in range(2000)]
        for message in sent:
            ours.send(message)
        assert ours._unsent, "more than the other end's queue holds"
        heard = heard_by(theirs)
        await until(lambda: len(heard) == len(sent))
        assert heard == sent
        ours.send(b"again")
        assert not ours._unsent
        await until(lambda: heard[-1] == b"again")
        ours.close()
        theirs.close()

    run(scenario)


def test_a_peer_that_reads_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(here: World) -> None:
        monkeypatch.setattr("kv_transfer.transports.local_messages.MAX_UNSENT", 16)
        ours, theirs = await here.pair()
        ended: list[bool] = []
        ours.on_close(lambda: ended.append(True))
        for _ in range(2000):
            ours.send(bytes(MAX_BYTES))
        assert ended == [True]
        assert not ours._unsent
        theirs.close()

    run(scenario)


@pytest.mark.parametrize("closes", ["ours", "theirs"])
def test_either_end_hears_of_the_close_once_and_sends_nothing_after(closes: str) -> None:
    async def scenario(here: World) -> None:
        ours, theirs = await here.pair()
        ended: list[str] = []
        for name, end in (("ours", ours), ("theirs", theirs)):
            end.on_close(partial(ended.append, name))
            heard_by(end)
        (ours if closes == "ours" else theirs).close()
        assert ended == [closes]
        await until(lambda: sorted(ended) == ["ours", "theirs"])
        for end in (ours, theirs):
            end.send(b"late")
            end.close()
        ours.on_close(lambda: ended.append("late"))
        assert ended[2:] == ["late"]

    run(scenario)


def test_a_peer_that_is_gone_is_noticed_by_sending_too() -> None:
    async def scenario(here: World) -> None:
        ours, theirs = await here.pair()
        ended: list[bool] = []
        ours.on_close(lambda: ended.append(True))  # and it does not listen
        theirs.close()
        ours.send(b"hello?")
        assert ended == [True]

    run(scenario)


@pytest.mark.parametrize("hello", [b"noise", b"BATONMSG", b"\0" * 16, b"BATONMSG" + b"\1" * 40])
def test_who_does_not_name_a_session_is_cut(hello: bytes) -> None:
    async def scenario(here: World) -> None:
        stranger = here.dial()
        stranger.send(hello)
        await until(lambda: is_cut(stranger))
        assert here.accepted == []
        stranger.close()

    run(scenario)


def test_who_says_nothing_is_cut_in_time_and_when_the_listener_closes() -> None:
    async def in_time(here: World) -> None:
        stranger = here.dial()
        await until(lambda: is_cut(stranger))
        stranger.close()

    async def at_the_end(here: World) -> None:
        stranger = here.dial()
        await until(lambda: bool(here.listener._unheard))
        here.listener.close()
        assert is_cut(stranger)
        stranger.close()

    run(in_time, hello_seconds=0.001)
    run(at_the_end)


def test_a_listener_that_is_not_there_is_a_lost_link() -> None:
    async def scenario(here: World) -> None:
        name = here.listener.name
        here.listener.close()
        with pytest.raises(TransferFailed):
            await connect(name, SESSION, max_bytes=MAX_BYTES)

    run(scenario)


def test_what_comes_before_anybody_listens_is_heard_then() -> None:
    """The data endpoint of a session may be connected a little later."""

    async def scenario(here: World) -> None:
        ours, theirs = await here.pair()
        ours.send(b"a header")
        await asyncio.sleep(0)
        ours.send(b"another")
        for _ in range(5):
            await asyncio.sleep(0)
        heard = heard_by(theirs)
        await until(partial(has, heard, 2))
        assert heard == [b"a header", b"another"]
        ours.close()
        theirs.close()

    run(scenario)


def test_a_listener_without_descriptors_does_not_ask_for_one_all_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(here: World) -> None:
        stranger = here.dial()
        refused: list[int] = []

        def accept() -> None:
            refused.append(1)
            raise OSError(errno.EMFILE, "too many open files")

        listening = here.listener._listener
        full = SimpleNamespace(accept=accept, fileno=cast("Any", listening).fileno)
        here.listener._listener = cast("Any", full)
        await until(lambda: bool(refused))
        for _ in range(100):
            await asyncio.sleep(0)
        assert len(refused) < 3
        here.listener._listener = listening
        stranger.send(b"BATONMSG" + bytes(8))
        await until(lambda: bool(here.accepted))
        here.accepted.pop()[1].close()
        stranger.close()

    run(scenario)
