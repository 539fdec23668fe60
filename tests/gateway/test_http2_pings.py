from __future__ import annotations

import asyncio
import ctypes
import socket
import struct

import pytest

from cluster.rpc import bind, create_server
from gateway.http2_pings import GREETING, Http2Pings, PingsRefused, ping

SETTINGS, SETTINGS_ACK = b"\0\0\6\4\0\0\0\0\0" + bytes(6), b"\0\0\0\4\1\0\0\0\0"
WINDOW = b"\0\0\4\10\0\0\0\0\0" + bytes(4)
GOAWAY = b"\0\0\x17\7\0\0\0\0\0" + bytes(8) + b"too_many_pings!"


def answer(number: int) -> bytes:
    frame = bytearray(ping(number))
    frame[4] = 1
    return bytes(frame)


def test_answers_come_with_their_numbers_and_settings_and_pings_are_acknowledged() -> None:
    received = Http2Pings().feed(SETTINGS + WINDOW + answer(7) + ping(99) + answer(8))
    assert received.numbers == [7, 8]
    assert received.reply == SETTINGS_ACK + answer(99)


def test_frames_may_come_in_any_pieces() -> None:
    whole = SETTINGS + answer(1) + WINDOW + SETTINGS_ACK + answer(2)
    pings = Http2Pings()
    pieces = [pings.feed(whole[at : at + 1]) for at in range(len(whole))]
    assert [number for piece in pieces for number in piece.numbers] == [1, 2]
    assert b"".join(piece.reply for piece in pieces) == SETTINGS_ACK


@pytest.mark.parametrize(
    "data",
    [GOAWAY, b"HTTP/1.1 400 Bad Request", b"\0\0\1\6\0\0\0\0\0x"],
    ids=["bye", "1.1", "size"],
)
def test_a_peer_that_takes_no_pings_is_found_out(data: bytes) -> None:
    with pytest.raises(PingsRefused):
        Http2Pings().feed(data)


def asked_without_python(connection: socket.socket, number: int) -> list[int]:
    """The numbers that come back while this thread waits with the interpreter lock in its hand;
    none after ten seconds."""
    libc = ctypes.PyDLL(None)  # whose functions do not give the lock away
    input_of = ctypes.create_string_buffer(struct.pack("=ihh", connection.fileno(), 1, 0))  # POLLIN
    buffer = ctypes.create_string_buffer(4096)
    pings, frame = Http2Pings(), ping(number)
    libc.send(connection.fileno(), frame, len(frame), 0)
    while libc.poll(input_of, 1, 10_000) == 1:
        num_bytes = libc.recv(connection.fileno(), buffer, len(buffer), 0)
        if numbers := pings.feed(buffer.raw[:num_bytes]).numbers:
            return numbers
    return []


def test_our_servers_answer_while_no_thread_of_their_process_may_run_python() -> None:
    async def scenario() -> None:
        server = create_server()
        port = bind(server, "127.0.0.1", 0)
        await server.start()
        connection = await asyncio.to_thread(greeted, port)
        assert asked_without_python(connection, 100) == [100]
        connection.close()
        await server.stop(None)

    asyncio.run(scenario())


def greeted(port: int) -> socket.socket:
    """Connected, with the first ping answered."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.sendall(GREETING + ping(1))
    pings = Http2Pings()
    while True:
        received = pings.feed(connection.recv(4096))
        connection.sendall(received.reply)
        if received.numbers:
            return connection


def test_our_servers_bear_many_pings_that_come_together() -> None:
    async def scenario() -> None:
        server = create_server()
        port = bind(server, "127.0.0.1", 0)
        await server.start()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GREETING + b"".join(ping(number) for number in range(100)))
        pings, numbers = Http2Pings(), list[int]()
        while len(numbers) < 100:
            received = pings.feed(await asyncio.wait_for(reader.read(4096), 20))
            writer.write(received.reply)
            numbers += received.numbers
        assert numbers == list(range(100))
        writer.close()
        await server.stop(None)

    asyncio.run(scenario())
