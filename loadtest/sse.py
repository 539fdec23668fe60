"""Server-sent events out of bytes that arrive in any pieces.

Understands all three line endings, comments, and data over several lines. Bytes of an event
that was never finished are dropped, as the WHATWG specification says.
"""

from __future__ import annotations

from typing import NamedTuple

MAX_EVENT_BYTES = 4 << 20


class EventTooLarge(ValueError):
    """An event went past `MAX_EVENT_BYTES` without its end."""


class Event(NamedTuple):
    """`kind` is the `event:` field, empty when there was none; `data` has lines joined by LF."""

    kind: bytes
    data: bytes


class EventParser:
    def __init__(self) -> None:
        self._rest = b""
        self._ended_in_cr = False

    def feed(self, data: bytes) -> list[Event]:
        """The events completed by `data`. Raises `EventTooLarge`."""
        blocks = (self._rest + self._with_line_feeds(data)).split(b"\n\n")
        self._rest = blocks.pop()
        if len(self._rest) > MAX_EVENT_BYTES:
            raise EventTooLarge(f"an event is larger than {MAX_EVENT_BYTES} bytes")
        events = []
        for block in blocks:
            if block.startswith(b"data: ") and b"\n" not in block:  # nearly all of them
                events.append(Event(b"", block[6:]))
            elif (event := _parse_block(block)) is not None:
                events.append(event)
        return events

    def _with_line_feeds(self, data: bytes) -> bytes:
        if self._ended_in_cr and data.startswith(b"\n"):  # one CRLF in two pieces
            data = data[1:]
            self._ended_in_cr = False
        if data:
            self._ended_in_cr = data.endswith(b"\r")
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        return data


def _parse_block(block: bytes) -> Event | None:
    kind, lines = b"", []
    for line in block.split(b"\n"):
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            lines.append(value)
        elif name == b"event":
            kind = value
    return Event(kind, b"\n".join(lines)) if lines else None
