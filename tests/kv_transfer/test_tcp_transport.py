"""Plain TCP moves messages of many pieces, and ends all that was posted when either side ends."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from cluster.errors import ConfigError, TransferFailed
from kv_transfer.transports.tcp import TcpEndpoint, TcpTransport
from kv_transfer.transports.tcp_options import open_socket
from tests.kv_twins import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence

    from kv_transfer.transports.base import Endpoint, Piece


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[TcpEndpoint, TcpEndpoint]]:
    accepted: asyncio.Future[Endpoint] = asyncio.get_running_loop().create_future()
    listening, connecting = (TcpTransport(connect_seconds=5.0) for _ in range(2))

    def accept(session_id: int, endpoint: Endpoint) -> None:
        assert session_id == 7
        accepted.set_result(endpoint)

    port = await listening.listen("127.0.0.1", 0, accept)
    one = await connecting.connect("127.0.0.1", port, 7)
    other = await accepted
    assert isinstance(other, TcpEndpoint)
    try:
        yield one, other
    finally:
        await connecting.close()
        await listening.close()


def run(scenario: Callable[[TcpEndpoint, TcpEndpoint], Coroutine[None, None, None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(30), pair() as (one, other):
            await scenario(one, other)

    asyncio.run(main())


def message(num_bytes: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)


async def fails(operation: Awaitable[None]) -> str:
    with pytest.raises(TransferFailed) as caught:
        await operation
    return str(caught.value.reason)


@pytest.mark.parametrize("num_bytes", [1, 4096, 5_000_000])
def test_a_message_arrives_whole_both_ways(num_bytes: int) -> None:
    async def scenario(one: TcpEndpoint, other: TcpEndpoint) -> None:
        for source, target in ((one, other), (other, one)):
            sent, received = message(num_bytes), torch.zeros(num_bytes, dtype=torch.uint8)
            await asyncio.gather(target.recv(received, 5), source.send(sent, 5))
            assert torch.equal(sent, received)

    run(scenario)


def test_messages_of_a_tag_keep_their_order_and_a_short_one_fills_the_front() -> None:
    async def scenario(one: TcpEndpoint, other: TcpEndpoint) -> None:
        sent = [message(100, seed) for seed in range(3)]
        received = [torch.zeros(200, dtype=torch.uint8) for _ in range(3)]
        operations = [other.recv(buffer, 5) for buffer in received]
        operations += [one.send(buffer, 5) for buffer in sent]
        await asyncio.gather(*operations)
        for ours, theirs in zip(sent, received, strict=True):
            assert torch.equal(theirs[:100], ours)
            assert not theirs[100:].any()

    run(scenario)


def test_pieces_are_gathered_and_scattered_wherever_they_lie() -> None:
    """More of them than one call of the kernel takes, cut differently on both sides."""

    async def scenario(one: TcpEndpoint, other: TcpEndpoint) -> None:
        sent, received = message(3000 * 32), torch.zeros(3000 * 32, dtype=torch.uint8)
        pieces = [sent.numpy()[start : start + 32] for start in range(0, len(sent), 32)]
        targets = [received.numpy()[start : start + 40] for start in range(0, len(sent), 40)]
        await asyncio.gather(other.recv_pieces(targets, 9), one.send_pieces(pieces, 9))
        assert torch.equal(sent, received)

    run(scenario)


def test_what_is_examined_was_moved_and_what_is_written_behind_it_then_still_leaves() -> None:
    async def scenario(one: TcpEndpoint, other: TcpEndpoint) -> None:
        sent, received = message(3_000_000), torch.zeros(3_000_000, dtype=torch.uint8)
        pieces, targets = (list(whole.numpy().reshape(30, -1)) for whole in (sent, received))
        behind, arrived = (np.zeros(30, dtype=np.uint8) for _ in range(2))
        left: list[int] = []
        came: list[int] = []

        def leave(some: Sequence[Piece]) -> None:
            left.extend(int(piece.sum()) % 251 for piece in some)
            behind[: len(left)] = left

        def come(some: Sequence[Piece]) -> None:
            came.extend(int(piece.sum()) % 251 for piece in some)

        await asyncio.gather(
            other.recv_pieces(targets, 9, come, [arrived]),
            one.send_pieces(pieces, 9, leave, [behind]),
        )
        assert torch.equal(sent, received)
        assert came == left == arrived.tolist()

    run(scenario)


def test_a_message_that_ends_in_the_middle_of_a_piece_leaves_the_rest_alone() -> None:
    async def scenario(one: TcpEndpoint, other: TcpEndpoint) -> None:
        sent, received = message(25), torch.zeros(40, dtype=torch.uint8)
        sizes: list[int] = []
        receiving = other.recv_pieces(
            list(received[:30].numpy().reshape(3, 10)), 9,
            lambda some: sizes.extend(piece.nbytes for piece in some), [received[30:].numpy()],
        )  # fmt: skip
        await asyncio.gather(receiving, one.send(sent, 9))
        assert torch.equal(received[:25], sent)
        assert not received[25:].any()
        assert sizes == [10, 10, 5]

    run(scenario)


def test_one_small_message_passes_a_large_one_and_none_of_its_own_tag() -> None:
    """So the next payload can be made ready for, while few receives of headers are needed."""
    small, large, other_large = message(10), message(100_000), message(8_000_000)

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            transport = TcpTransport(connect_seconds=5.0)
            reading = asyncio.create_task(asyncio.to_thread(read_slowly, server, 6, begin))
            one = await transport.connect("127.0.0.1", server.getsockname()[1], 7)
            posts = [(other_large, 1), (large, 2), (small, 3), (small, 3), (large, 2), (small, 2)]
            sent = [one.send(buffer, tag) for buffer, tag in posts]
            begin.set()
            assert await reading == [(1, 8_000_000), (3, 10), (2, 100_000), (3, 10), (2, 100_000),
                                     (2, 10)]  # fmt: skip
            await asyncio.gather(*sent)
            await transport.close()

    begin = threading.Event()
    asyncio.run(main())


def read_slowly(
    server: socket.socket, num_messages: int, begin: threading.Event
) -> list[tuple[int, int]]:
    """The tag and length of each message, in the order of their bytes."""
    found = []
    peer, _ = server.accept()
    with peer, peer.makefile("rb") as stream:
        stream.read(16)
        peer.sendall(b"BATONTCP")
        assert begin.wait(10)
        for _ in range(num_messages):
            tag, length = struct.unpack("<QQ", stream.read(16))
            assert len(stream.read(length)) == length
            found.append((tag, length))
    return found


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_nothing_is_paced_on_its_way_to_the_machine_itself(family: socket.AddressFamily) -> None:
    with open_socket(family, ("127.0.0.1" if family is socket.AF_INET else "::1", 9)) as connection:
        used = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
    assert used.rstrip(b"\0") == b"reno"


def test_a_wire_keeps_the_congestion_control_of_the_machine() -> None:
    ours = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_bytes().strip()
    with open_socket(socket.AF_INET, ("192.0.2.1", 9)) as connection:  # nobody's address
        used = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
    assert used.rstrip(b"\0") == ours


def test_a_message_waits_for_its_receive() -> None:
    async def scenario(one: TcpEndpoint, other: TcpEndpoint) -> None:
        sent, received = message(64), torch.zeros(64, dtype=torch.uint8)
        await one.send(sent, 5)
        await other.recv(received, 5)
        assert torch.equal(sent, received)

    run(scenario)


def test_the_end_of_one_side_ends_what_is_posted_on_both() -> None:
    async def scenario(one: TcpEndpoint, other: TcpEndpoint) -> None:
        ends: list[str] = []
        one.on_close(lambda: ends.append("one"))
        other.on_close(lambda: ends.append("other"))
        waiting = [other.recv(torch.zeros(8, dtype=torch.uint8), tag) for tag in (1, 2)]
        stuck = [one.send(message(30_000_000), 3) for _ in range(2)]  # nobody receives them
        assert await one.close()
        assert {await fails(each) for each in (*waiting, *stuck)} == {"link_lost"}
        await until(lambda: sorted(ends) == ["one", "other"])
        assert await fails(one.send(message(8), 1)) == "link_lost"
        assert await fails(other.recv(torch.zeros(8, dtype=torch.uint8), 1)) == "link_lost"
        assert await one.close()
        other.on_close(lambda: ends.append("late"))
        assert ends.count("late") == 1

    run(scenario)


def test_a_message_longer_than_its_receive_fails_it_and_ends_the_connection() -> None:
    async def scenario(one: TcpEndpoint, other: TcpEndpoint) -> None:
        small = torch.zeros(10, dtype=torch.uint8)
        receiving, next_one = other.recv(small, 5), other.recv(small, 5)
        one.send(message(11), 5).add_done_callback(lambda done: done.exception())
        assert await fails(receiving) == "frame_malformed"
        assert await fails(next_one) == "link_lost"
        assert not small.any()

    run(scenario)


@pytest.mark.parametrize("hello", [b"", b"GET / HTTP/1.1\r\n\r\n", b"BATONTCP", b"\0" * 16])
def test_a_peer_that_speaks_something_else_is_closed_unread(hello: bytes) -> None:
    async def main() -> None:
        transport = TcpTransport(connect_seconds=0.2)
        port = await transport.listen("127.0.0.1", 0, lambda *_: pytest.fail("accepted"))
        with socket.create_connection(("127.0.0.1", port), timeout=10) as peer:
            peer.sendall(hello)
            with contextlib.suppress(ConnectionResetError):  # some of it was never read
                assert await asyncio.to_thread(peer.recv, 1) == b""
        await transport.close()

    asyncio.run(main())


def test_peers_that_connect_and_say_nothing_keep_nobody_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor do they take all descriptors: who has waited longest makes room."""
    monkeypatch.setattr("kv_transfer.transports.tcp.MAX_GREETING", 8)

    async def main() -> None:
        transport = TcpTransport(connect_seconds=60.0)
        named: list[int] = []
        port = await transport.listen("127.0.0.1", 0, lambda session, _: named.append(session))
        silent = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(40)]
        endpoint = await transport.connect("127.0.0.1", port, 7)
        assert named == [7]
        for peer in silent[:-8]:
            with contextlib.suppress(ConnectionResetError):
                assert await asyncio.to_thread(peer.recv, 1) == b""
        await endpoint.close()
        await transport.close()
        for peer in silent:
            peer.close()

    asyncio.run(main())


def test_nobody_there_and_somebody_else_there_are_typed_failures() -> None:
    async def main() -> None:
        transport = TcpTransport(connect_seconds=1.0)
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        assert await fails(transport.connect("127.0.0.1", port, 1)) == "transport_refused"  # type: ignore[arg-type]
        server.close()
        await server.wait_closed()
        assert await fails(transport.connect("127.0.0.1", port, 1)) == "link_lost"  # type: ignore[arg-type]
        await transport.close()

    asyncio.run(main())


def test_it_listens_on_the_address_that_it_was_given_and_says_when_it_is_taken() -> None:
    async def main() -> None:
        one, other = (TcpTransport(connect_seconds=1.0) for _ in range(2))
        port = await one.listen("127.0.0.1", 0, lambda *_: None)
        with pytest.raises(ConfigError) as caught:
            await other.listen("127.0.0.1", port, lambda *_: None)
        assert caught.value.param == "kv_port"
        assert caught.value.message.endswith("for KV transfer: Address already in use.")
        await other.close()
        await one.close()

    asyncio.run(main())
