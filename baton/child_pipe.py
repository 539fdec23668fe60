"""What a child process says on one pipe, line by line.

Life of a pipe
    1. `open`: whatever comes is read, as fast as it is taken.
    2. `lines` gives each line; one that is longer than the buffer comes in pieces.
    3. It ends when nobody can write to it any more, or by `child_has_ended`. Then all that the
       child has said is in the pipe or in our buffer, and is given; a grandchild that keeps the
       pipe open is not waited for. No clock is asked: a busy machine loses no last words.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
import termios
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class ChildPipe:
    """The reading end of a pipe, made by `open`."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._stream = asyncio.StreamReader()
        self._transport: asyncio.BaseTransport

    @classmethod
    async def open(cls, descriptor: int) -> ChildPipe:
        """It owns the descriptor from now on."""
        pipe = cls(descriptor)
        pipe._transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(pipe._stream),
            os.fdopen(descriptor, "rb", buffering=0),
        )
        return pipe

    def lines(self) -> AsyncIterator[bytes]:
        return lines_of(self._stream)

    def child_has_ended(self) -> None:
        """Take what is in the pipe now, and nothing that comes later. Idempotent."""
        if self._transport.is_closing():
            return
        last_words = os.read(self._descriptor, _num_readable(self._descriptor))
        self._transport.close()
        self._stream.feed_data(last_words)
        self._stream.feed_eof()

    def close(self) -> None:
        self._transport.close()


def _num_readable(descriptor: int) -> int:
    (count,) = struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)))
    return int(count)


async def lines_of(stream: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The lines of a stream until it ends; a line longer than its buffer comes in pieces."""
    while True:
        try:
            yield await stream.readuntil(b"\n")
        except asyncio.LimitOverrunError as error:
            yield await stream.readexactly(error.consumed)
        except asyncio.IncompleteReadError as error:
            if error.partial:
                yield error.partial
            return
