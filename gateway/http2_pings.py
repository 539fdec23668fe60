"""PING frames of HTTP/2 (RFC 9113, 6.7): the questions that a gRPC server answers without Python.

Life of a connection
    1. `GREETING` is sent: the preface, and settings that ask for nothing. No stream is ever opened.
    2. `ping(number)` is sent whenever somebody wants to know; the answer carries the same number.
    3. `feed` takes what comes: answers, the peer's settings and pings, which are acknowledged, and
       what does not matter. `PingsRefused` when the peer ends the connection, or speaks otherwise.

gRPC's core reads and answers on threads of its own that need no interpreter lock: a busy engine, a
long garbage collection or a blocked event loop do not delay an answer. Unless told otherwise
(`cluster/rpc.py`) it says good-bye to who sends more than a few.

Pure: bytes in, bytes out.
"""

from __future__ import annotations

from typing import NamedTuple

_SETTINGS, _PING, _GOAWAY = 4, 6, 7
_ACK = 1
_HEAD_BYTES = 9
_PING_BYTES = 8
_MAX_FRAME_BYTES = 1 << 14  # what a peer may send to who has set nothing else


class PingsRefused(Exception):
    """The peer wants no pings, or is no HTTP/2 server."""


class Received(NamedTuple):
    """`numbers`: of the pings answered; `reply`: to be sent now."""

    numbers: list[int]
    reply: bytes


def _frame(kind: int, flags: int, payload: bytes = b"") -> bytes:
    """On stream 0, which is the connection."""
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + bytes(4) + payload


GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(_SETTINGS, 0)


def ping(number: int) -> bytes:
    return _frame(_PING, 0, number.to_bytes(_PING_BYTES, "big"))


class Http2Pings:
    """What comes on one connection."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> Received:
        """Raises `PingsRefused`; the connection is of no use then."""
        self._buffer += data
        numbers: list[int] = []
        reply = b""
        while (frame := self._next_frame()) is not None:
            kind, is_ack, payload = frame
            if kind == _GOAWAY:
                raise PingsRefused(repr(payload[_PING_BYTES:]))
            if kind == _SETTINGS and not is_ack:
                reply += _frame(_SETTINGS, _ACK)
            elif kind == _PING:
                if len(payload) != _PING_BYTES:
                    raise PingsRefused("a ping of another size")
                if is_ack:
                    numbers.append(int.from_bytes(payload, "big"))
                else:
                    reply += _frame(_PING, _ACK, payload)
        return Received(numbers, reply)

    def _next_frame(self) -> tuple[int, bool, bytes] | None:
        """Its kind, whether it acknowledges, its payload; None until it is whole."""
        if len(self._buffer) < _HEAD_BYTES:
            return None
        size = int.from_bytes(self._buffer[:3], "big")
        if size > _MAX_FRAME_BYTES:
            raise PingsRefused("a frame that is too long")
        end = _HEAD_BYTES + size
        if len(self._buffer) < end:
            return None
        kind, flags = self._buffer[3], self._buffer[4]
        payload, self._buffer = self._buffer[_HEAD_BYTES:end], self._buffer[end:]
        return kind, bool(flags & _ACK), payload
