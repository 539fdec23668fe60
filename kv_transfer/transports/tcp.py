"""Plain TCP as a transport, for KV in host memory: no copy but the kernel's two.

    message  tag uint64, length uint64, then `length` bytes

Life of a connection
    1. `connect` names its session; the listener answers with the same magic. Any other peer is
       closed unread. The socket is then blocking, and belongs to two threads (`tcp_threads.py`).
    2. `send` and `recv` post to these threads. The pieces of a message lie anywhere in memory: a
       frame goes from the blocks of one pool to the blocks of the other, by no staging slot. A
       message for which no receive is posted waits, and those behind it.
    3. The peer closes, dies, or sends what cannot be: the socket is shut down. Each thread ends
       what it was doing, then all that was posted to it, in failure; `on_close` is called.
    4. `close` is the same, and waits for the threads: after it nothing touches memory.

UCX over TCP takes buffers in one piece only, so blocks must be packed and unpacked, and wakes the
event loop for every part of a message: half the rate, on a machine whose processors are the limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections import OrderedDict
from typing import TYPE_CHECKING

from cluster.errors import ConfigError, ServingError
from kv_transfer.failures import FailureReason, failure
from kv_transfer.transports.closes_once import ClosesOnce
from kv_transfer.transports.tcp_options import hand_to_threads, open_socket
from kv_transfer.transports.tcp_threads import Posted, Receiving, Sending

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from kv_transfer.transports.base import Accept, Examine, Piece

logger = logging.getLogger(__name__)

_HELLO = struct.Struct("<8sQ")
_MAGIC = b"BATONTCP"
_BACKLOG = 128
_CLOSE_SECONDS = 2.0
MAX_GREETING = 128  # connections that have yet to name their session


class TcpEndpoint(ClosesOnce):
    """One connection. Made once both sides know each other."""

    def __init__(self, transport: TcpTransport, connection: socket.socket) -> None:
        super().__init__()
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._socket = connection
        hand_to_threads(connection)
        self._sending = Sending(connection, self._on_broken)
        self._receiving = Receiving(connection, self._on_broken)

    @property
    def transport_name(self) -> str:
        return "tcp"

    @property
    def lanes(self) -> tuple[str, ...]:
        return ("plain tcp",)

    def send(self, buffer: torch.Tensor, tag: int) -> asyncio.Future[None]:
        return self.send_pieces([buffer.numpy()], tag)

    def recv(self, buffer: torch.Tensor, tag: int) -> asyncio.Future[None]:
        return self.recv_pieces([buffer.numpy()], tag)

    def send_pieces(
        self,
        pieces: Sequence[Piece],
        tag: int,
        examine: Examine | None = None,
        behind: Sequence[Piece] = (),
    ) -> asyncio.Future[None]:
        posted = Posted(self._loop, tag, pieces, examine, behind)
        self._sending.post(posted)
        return posted.done

    def recv_pieces(
        self,
        pieces: Sequence[Piece],
        tag: int,
        examine: Examine | None = None,
        behind: Sequence[Piece] = (),
    ) -> asyncio.Future[None]:
        posted = Posted(self._loop, tag, pieces, examine, behind)
        self._receiving.post(posted)
        return posted.done

    async def close(self) -> bool:
        self._cut()
        ended = await asyncio.to_thread(self._join)
        if ended:
            self._socket.close()
        self._transport.forget(self)
        return ended

    def _join(self) -> bool:
        return self._sending.join(_CLOSE_SECONDS) and self._receiving.join(_CLOSE_SECONDS)

    def _on_broken(self) -> None:
        """Called by either thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._cut)

    def _cut(self) -> None:
        self._end_once(self._shut_down)

    def _shut_down(self) -> None:
        with contextlib.suppress(OSError):  # the peer was faster
            self._socket.shutdown(socket.SHUT_RDWR)
        self._sending.stop()
        self._receiving.stop()


class TcpTransport:
    """The connections of one process."""

    def __init__(self, *, connect_seconds: float) -> None:
        self._connect_seconds = connect_seconds
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._endpoints: set[TcpEndpoint] = set()
        # Who has waited longest is first.
        self._greeting: OrderedDict[asyncio.Task[None], None] = OrderedDict()

    @property
    def name(self) -> str:
        return "tcp"

    @property
    def port(self) -> int:
        return 0 if self._listener is None else int(self._listener.getsockname()[1])

    async def listen(self, host: str, port: int, accept: Accept) -> int:
        """Raises `ConfigError` when the address cannot be listened on."""
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        except OSError as error:
            why = (error.strerror or str(error)).partition(" (while")[0]  # names the address again
            raise ConfigError(
                f"{host}:{port} cannot be used for KV transfer: {why}.",
                param="kv_port",
            ) from error
        listener.setblocking(False)
        self._listener = listener
        self._accepting = asyncio.create_task(self._accept_forever(listener, accept))
        return self.port

    async def connect(self, host: str, port: int, session_id: int) -> TcpEndpoint:
        loop = asyncio.get_running_loop()
        connection: socket.socket | None = None
        try:
            async with asyncio.timeout(self._connect_seconds):
                found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                family, _, _, _, address = found[0]
                connection = open_socket(family, address)
                await loop.sock_connect(connection, address)
                answer = await _ask(connection, session_id)
        except (OSError, TimeoutError) as error:
            _close(connection)
            raise failure(FailureReason.LINK_LOST) from error
        except asyncio.CancelledError:
            _close(connection)
            raise
        if answer != _MAGIC:
            _close(connection)
            logger.error(
                "%s:%d does not take KV over plain TCP. A node with KV on a GPU, or with --ucx-tls "
                "or another --require-transport, speaks UCX: give --ucx-tls to both.", host, port,
            )  # fmt: skip
            raise failure(FailureReason.TRANSPORT_REFUSED)
        return self._made(connection)

    async def close(self) -> None:
        tasks = [*self._greeting]
        if self._accepting is not None:
            tasks.append(self._accepting)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for endpoint in list(self._endpoints):
            await endpoint.close()
        _close(self._listener)

    def forget(self, endpoint: TcpEndpoint) -> None:
        self._endpoints.discard(endpoint)

    def _made(self, connection: socket.socket | None) -> TcpEndpoint:
        assert connection is not None  # noqa: S101 (our bug)
        endpoint = TcpEndpoint(self, connection)
        self._endpoints.add(endpoint)
        return endpoint

    async def _accept_forever(self, listener: socket.socket, accept: Accept) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:  # out of descriptors, or the peer is gone already
                logger.warning("a KV connection could not be accepted: %s", error)
                await asyncio.sleep(0.1)
                continue
            connection.setblocking(False)
            greeting = asyncio.create_task(self._greet(connection, accept))
            self._greeting[greeting] = None
            greeting.add_done_callback(lambda done: self._greeting.pop(done, None))
            await asyncio.sleep(0)  # it has begun, so it can be cancelled
            if len(self._greeting) > MAX_GREETING:
                self._greeting.popitem(last=False)[0].cancel()

    async def _greet(self, connection: socket.socket, accept: Accept) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_seconds):
                hello = await _read(connection, _HELLO.size)
                magic, session_id = _HELLO.unpack(hello.ljust(_HELLO.size, b"\0"))
                if magic == _MAGIC:
                    await loop.sock_sendall(connection, _MAGIC)
        except (OSError, TimeoutError) as error:
            logger.warning("a KV connection ended before it named its session: %s", error)
            magic = b""
        except asyncio.CancelledError:
            connection.close()
            raise
        if magic != _MAGIC:
            connection.close()
            return
        try:
            accept(session_id, self._made(connection))
        except ServingError as error:
            logger.warning("a KV connection was refused: %s", error.message)


async def _ask(connection: socket.socket, session_id: int) -> bytes:
    """What the other side says to our hello; nothing when it breaks off."""
    with contextlib.suppress(ConnectionError):
        await asyncio.get_running_loop().sock_sendall(connection, _HELLO.pack(_MAGIC, session_id))
        return await _read(connection, len(_MAGIC))
    return b""


async def _read(connection: socket.socket, num_bytes: int) -> bytes:
    """That many bytes, fewer when the peer closes before."""
    loop = asyncio.get_running_loop()
    data = b""
    while len(data) < num_bytes:
        part = await loop.sock_recv(connection, num_bytes - len(data))
        if not part:
            break
        data += part
    return data


def _close(connection: socket.socket | None) -> None:
    if connection is not None:
        connection.close()
