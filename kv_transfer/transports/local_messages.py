"""Short messages between two processes of one machine, over a socket that keeps them apart.

For pairs that share slots of GPU memory and have nothing else to send: a message leaves in the call
that sends it, and is heard in the round of the event loop that finds it. By UCX both ends go
through its worker, futures and a TCP connection: a loop that has slept takes three times as long.

Life of a connection
    1. The listener has a name that the kernel made up; the peer hears it over the control stream,
       connects, and names the session in its first message. Any other is closed unheard.
    2. `send` keeps the order. What finds no room at the other end waits here for it; a peer that
       reads nothing for too long is given up.
    3. The peer closes or dies: `on_close`, once. After `close` nothing is heard any more.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections import deque
from typing import TYPE_CHECKING

from kv_transfer.failures import FailureReason, failure
from kv_transfer.transports.closes_once import ClosesOnce

if TYPE_CHECKING:
    from collections.abc import Callable


logger = logging.getLogger(__name__)

_HELLO = struct.Struct("<8sQ")
_MAGIC = b"BATONMSG"
_BACKLOG = 128
_PAUSE_SECONDS = 0.1
MAX_UNSENT = 16_384  # messages that find no room: many times what two peers have to tell


class LocalMessages(ClosesOnce):
    """One end of a connection. Used on the event loop that made it."""

    def __init__(self, connection: socket.socket, *, max_bytes: int) -> None:
        """`max_bytes`: of a message that comes; of a longer one the rest is lost."""
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._socket = connection
        self._buffer = memoryview(bytearray(max_bytes))
        self._unsent: deque[bytes] = deque()
        self._on_message: Callable[[memoryview], None] | None = None

    def listen(self, on_message: Callable[[memoryview], None]) -> None:
        """From now on call it with each message, whose bytes are lent for the call."""
        if self._on_message is None and not self._is_closed:
            self._loop.add_reader(self._socket.fileno(), self._hear)
        self._on_message = on_message

    def pause(self) -> None:
        """Hear nothing, until somebody listens again: what comes meanwhile waits."""
        if self._on_message is not None and not self._is_closed:
            self._loop.remove_reader(self._socket.fileno())
        self._on_message = None

    def send(self, message: bytes) -> None:
        """Nothing when the connection has ended, which `on_close` tells."""
        if self._is_closed:
            return
        if len(self._unsent) >= MAX_UNSENT:
            self._break(OSError("the peer reads nothing"))
            return
        if self._unsent:
            self._unsent.append(message)
            return
        try:
            self._socket.send(message)
        except BlockingIOError:
            self._unsent.append(message)
            self._loop.add_writer(self._socket.fileno(), self._send_unsent)
        except OSError as error:
            self._break(error)

    def close(self) -> None:
        """Idempotent."""
        self._end_once(self._drop)

    def _drop(self) -> None:
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_writer(self._socket.fileno())
        self._socket.close()
        self._unsent.clear()

    def _hear(self) -> None:
        """One message a round, so that what it began is looked at before the next."""
        try:
            size = self._socket.recv_into(self._buffer)
        except BlockingIOError:
            return
        except OSError as error:
            self._break(error)
            return
        if size == 0:
            self.close()
        elif self._on_message is not None:
            self._on_message(self._buffer[:size])

    def _send_unsent(self) -> None:
        try:
            while self._unsent:
                self._socket.send(self._unsent[0])
                self._unsent.popleft()
        except BlockingIOError:
            return
        except OSError as error:
            self._break(error)
            return
        self._loop.remove_writer(self._socket.fileno())

    def _break(self, error: OSError) -> None:
        logger.debug("messages of a peer on this machine ended: %s", error)
        self.close()


async def connect(name: bytes, session_id: int, *, max_bytes: int) -> LocalMessages:
    """To a listener of that name. Raises `TransferFailed` when there is none that can be reached
    from here."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(connection, name)
    except (OSError, asyncio.CancelledError) as error:
        connection.close()
        if isinstance(error, asyncio.CancelledError):
            raise
        raise failure(FailureReason.LINK_LOST) from error
    messages = LocalMessages(connection, max_bytes=max_bytes)
    messages.send(_HELLO.pack(_MAGIC, session_id))
    return messages


class LocalListener:
    """Of one receiver; begins to listen when its name is first asked for."""

    def __init__(
        self, accept: Callable[[int, LocalMessages], None], *, max_bytes: int, hello_seconds: float
    ) -> None:
        """`accept` gets the session that a peer names, and its connection, which it closes if
        there is no such session."""
        self._accept = accept
        self._max_bytes = max_bytes
        self._hello_seconds = hello_seconds
        self._listener: socket.socket | None = None
        self._unheard: dict[LocalMessages, asyncio.TimerHandle] = {}

    @property
    def name(self) -> bytes:
        if self._listener is None:
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._listener.setblocking(False)
            self._listener.bind(b"")  # any name that is free, outside of the file system
            self._listener.listen(_BACKLOG)
            self._listen()
        name: bytes = self._listener.getsockname()
        return name

    def close(self) -> None:
        """Connections that were accepted are not its own any more."""
        for messages in list(self._unheard):
            messages.close()
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None

    def _listen(self) -> None:
        if self._listener is not None:
            loop = asyncio.get_running_loop()
            loop.add_reader(self._listener.fileno(), self._on_connection)

    def _on_connection(self) -> None:
        if self._listener is None:
            return
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:  # the peer is gone already
            return
        except OSError as error:  # out of descriptors: it would be told again and again
            logger.warning("a peer on this machine could not be accepted: %s", error)
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._listener.fileno())
            loop.call_later(_PAUSE_SECONDS, self._listen)
            return
        connection.setblocking(False)
        messages = LocalMessages(connection, max_bytes=self._max_bytes)
        loop = asyncio.get_running_loop()
        self._unheard[messages] = loop.call_later(self._hello_seconds, messages.close)
        messages.on_close(lambda: self._forget(messages))
        messages.listen(lambda hello: self._greet(messages, hello))

    def _greet(self, messages: LocalMessages, hello: memoryview) -> None:
        self._forget(messages)
        if len(hello) != _HELLO.size or hello[: len(_MAGIC)] != _MAGIC:
            logger.warning("closed a connection from this machine that is no prefill node's")
            messages.close()
            return
        _, session_id = _HELLO.unpack(hello)
        messages.pause()  # the session may have to wait for its data endpoint
        self._accept(session_id, messages)

    def _forget(self, messages: LocalMessages) -> None:
        timer = self._unheard.pop(messages, None)
        if timer is not None:
            timer.cancel()
