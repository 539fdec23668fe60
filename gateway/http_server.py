"""One HTTP listener: uvicorn inside our own event loop, with bounds on what comes before a request.

Life of a server
    1. It is made and has its port, so that a busy one stops the start and port 0 becomes a number.
       Until it listens, another that does not listen yet may have it, too.
    2. `start`: it listens, and serves until `stop`.
    3. `stop` closes the listener and idle connections; those with a request finish it first.
       `abort` does not wait for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from typing import TYPE_CHECKING

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cluster.errors import ConfigError, cannot_listen
from gateway.unread_body import UnreadBody

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.types import ASGIApp

MAX_HEAD_BYTES = 16 * 1024
HEAD_SECONDS = 30.0
# Longer than the idle time of proxies, which would else send into a closing connection.
KEEP_ALIVE_SECONDS = 120
BACKLOG = 2048
# Key of the scope: a function that ends the connection at once. An end in order waits, for ever,
# until the client has read what it was sent.
CUT = "baton.cut"
_UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)
_HEAD_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"content-length: 0\r\nconnection: close\r\n\r\n"
)


class BoundedProtocol(HttpToolsProtocol):
    """A head of a request, of the first on a connection as of the next, must arrive in time and in
    16 KiB; tokens must not wait for more."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()
        connection = transport.get_extra_info("socket")
        if connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_timer.cancel()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        self._num_head_bytes = 0
        self._is_in_head = True
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def data_received(self, data: bytes) -> None:
        if self.timeout_keep_alive_task is not None:  # it was idle, and is not any more
            self._await_head()
        super().data_received(_without_upgrade(data) if self._is_in_head else data)
        if self._is_in_head:
            self._num_head_bytes += len(data)
            if self._num_head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.transport.write(_HEAD_TOO_LARGE)
                self.transport.close()

    def on_message_begin(self) -> None:
        self._num_head_bytes = 0
        self._is_in_head = True
        super().on_message_begin()
        self.scope[CUT] = self.transport.abort  # type: ignore[literal-required]

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._head_timer.cancel()
        super().on_headers_complete()


def _without_upgrade(data: bytes) -> bytes:
    """All of a head, or what it begins with, without an offer of another protocol, which a server
    may pass over: the parser would take what follows for that one, and lose the body. Java's client
    offers HTTP/2 with its first request, in one piece."""
    end = data.find(b"\r\n\r\n")
    head = data if end < 0 else data[:end]
    return _UPGRADE.sub(b"\r\nx-upgrade:", head) + data[len(head) :]


class _Uvicorn(uvicorn.Server):
    """Signals are the process's affair."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    def __init__(self, app: ASGIApp, host: str, port: int, *, param: str) -> None:
        """`param` names the option that is to blame when the port is taken."""
        self._socket = _listen(host, port, param)
        self.host = host
        self._param = param
        self.port: int = self._socket.getsockname()[1]
        self._server = _Uvicorn(
            uvicorn.Config(
                UnreadBody(app),
                http=BoundedProtocol,
                ws="none",
                lifespan="off",
                interface="asgi3",
                loop="none",
                log_config=None,
                log_level="warning",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                backlog=BACKLOG,
            )
        )
        self._task: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Where a client on this machine reaches it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @property
    def is_stopping(self) -> bool:
        return self._server.should_exit

    def start(self) -> None:
        """Raises `ConfigError` when another listens there by now; uvloop would tell nobody."""
        try:
            self._socket.listen(BACKLOG)
        except OSError as error:
            where = f"{self.host}:{self.port}"
            raise cannot_listen(where, error, param=self._param) from error
        self._task = asyncio.create_task(
            self._server.serve(sockets=[self._socket]), name=f"http {self.port}"
        )

    def stop(self) -> None:
        """Accept nobody; requests in flight go on."""
        self._server.should_exit = True

    def abort(self) -> None:
        """Do not wait for requests in flight."""
        self._server.should_exit = True
        self._server.force_exit = True

    async def wait(self) -> None:
        """Until it has stopped; raises what broke it."""
        if self._task is not None:
            await self._task


def _listen(host: str, port: int, param: str) -> socket.socket:
    try:
        address = socket.getaddrinfo(
            host or "0.0.0.0", port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(address[0], address[1], address[2])
    except OSError as error:
        raise ConfigError(
            f"cannot use the address {host!r}: {error.strerror}.", param=param
        ) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address[4])
    except OSError as error:
        listener.close()
        raise cannot_listen(f"{host}:{port}", error, param=param) from error
    listener.setblocking(False)
    return listener
