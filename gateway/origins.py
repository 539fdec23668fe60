"""Which web pages a browser lets read the answers (CORS): those of `--allowed-origins`, else none.

Stands before the key check: a browser asks first, without a key, whether it may send one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

ANY = "*"
NO_CONTENT = 204
PREFLIGHT_SECONDS = b"600"
_ASKED_METHOD = b"access-control-request-method"
_ASKED_HEADERS = b"access-control-request-headers"


class Origins:
    """Wraps an application. `allowed`: origins as browsers write them, or "*" for all."""

    def __init__(self, app: ASGIApp, allowed: Sequence[str]) -> None:
        self._app = app
        self._allowed = frozenset(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope.get("headers", ()))
        origin = headers.get(b"origin")
        if origin is None or not self._allows(origin):
            await self._app(scope, receive, send)
        elif scope["method"] == "OPTIONS" and _ASKED_METHOD in headers:
            await _permit(send, origin, headers.get(_ASKED_HEADERS, b""))
        else:
            await self._app(scope, receive, _Permitting(send, origin))

    def _allows(self, origin: bytes) -> bool:
        return ANY in self._allowed or origin.decode("latin-1") in self._allowed


async def _permit(send: Send, origin: bytes, asked_headers: bytes) -> None:
    headers = [
        (b"access-control-allow-origin", origin),
        (b"access-control-allow-methods", b"GET, POST"),
        (b"access-control-allow-headers", asked_headers),
        (b"access-control-max-age", PREFLIGHT_SECONDS),
        (b"vary", b"origin"),
    ]
    await send({"type": "http.response.start", "status": NO_CONTENT, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


class _Permitting:
    """A `send` that tells the browser on the answer's head whose page may read it."""

    __slots__ = ("_origin", "_send")

    def __init__(self, send: Send, origin: bytes) -> None:
        self._send = send
        self._origin = origin

    def __call__(self, message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            permission = [
                (b"access-control-allow-origin", self._origin),
                (b"access-control-expose-headers", b"x-request-id"),
                (b"vary", b"origin"),
            ]
            message = {**message, "headers": [*message.get("headers", ()), *permission]}
        return self._send(message)
