"""A request that is answered before its body was read: refused by its head, or by too long a body.

What of the body is still to come would stand in front of the client's next request, and a client
that is cut off while it writes sees a broken connection instead of its answer. So before the answer
the rest is taken and thrown away, within bounds. One who sends more than that, or waits to be told
to send (`Expect: 100-continue`), is answered at once, and its connection ends behind the answer.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_DISCARDED_BYTES = 32 * 1024 * 1024
DISCARD_SECONDS = 5.0
_CLOSE = (b"connection", b"close")


class UnreadBody:
    """Wraps an application. Raw ASGI: what has no body costs nothing."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        if b"content-length" in headers or b"transfer-encoding" in headers:
            body = _Body(headers, receive, send)
            receive, send = body.receive, body.send
        await self._app(scope, receive, send)


class _Body:
    """`receive` and `send` of one request."""

    __slots__ = ("_declared", "_is_awaited", "_is_left", "_receive", "_send")

    def __init__(self, headers: dict[bytes, bytes], receive: Receive, send: Send) -> None:
        length = headers.get(b"content-length", b"")
        self._declared = int(length) if length.isdigit() else 0
        self._is_awaited = b"expect" in headers  # the client may send nothing before it is told to
        self._is_left = True
        self._receive = receive
        self._send = send

    async def receive(self) -> Message:
        self._is_awaited = False  # now it is told
        message = await self._receive()
        self._is_left = message.get("more_body", False)
        return message

    def send(self, message: Message) -> Awaitable[None]:
        if self._is_left and message["type"] == "http.response.start":
            return self._begin_answer(message)
        return self._send(message)

    async def _begin_answer(self, head: Message) -> None:
        if not self._is_awaited and self._declared <= MAX_DISCARDED_BYTES:
            await self._discard()
        if self._is_left:
            head = {**head, "headers": [*head.get("headers", ()), _CLOSE]}
        await self._send(head)

    async def _discard(self) -> None:
        num_bytes = 0
        try:
            async with asyncio.timeout(DISCARD_SECONDS):
                while self._is_left and num_bytes <= MAX_DISCARDED_BYTES:
                    num_bytes += len((await self.receive()).get("body", b""))
        except TimeoutError:
            return
