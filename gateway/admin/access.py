"""Who may speak to the admin API besides having its token: no page of somebody else's.

A browser that was lured into calling a loopback port names the page in `Origin`, and under DNS
rebinding a foreign name in `Host`. Both are refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cluster.errors import PermissionDenied
from gateway.admin.token_file import WILDCARDS

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class HostGuard:
    """`host` is the address the server listens on; a wildcard address accepts any name."""

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app = app
        self._names = None if host in WILDCARDS else _LOOPBACK | {host}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        host = _host_of("//" + headers.get(b"host", b"").decode("latin-1"))
        if self._names is not None and host not in self._names:
            raise PermissionDenied("The admin API does not answer under this name.")
        origin = headers.get(b"origin")
        if origin is not None and _host_of(origin.decode("latin-1")) != host:
            raise PermissionDenied("The admin API does not answer pages of other sites.")
        await self._app(scope, receive, send)


def _host_of(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
