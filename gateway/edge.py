"""What every HTTP request passes first: one path, one id, one key check, one last resort.

1. The path is made plain (`//v1/models/` is `/v1/models`), before anything looks at it, so that
   routing and access can never disagree about it.
2. It gets an id: the client's own, cleaned, or a new one. Every answer carries it.
3. Without a valid key only the open paths are served; new paths are closed unless listed.
4. An error that nobody translated becomes an answer here, without its details.

Raw ASGI: no message of a stream costs more than one function call.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from typing import TYPE_CHECKING

from cluster.errors import AuthenticationFailed
from cluster.logging import log_context
from gateway.dialects.messages_errors import message_id
from gateway.http_errors import as_serving_error, log_refusal, send_error, status_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Keys of the scope.
REQUEST_ID = "baton.request_id"
KEY_HOLDER = "baton.key_holder"  # what `KeyCheck.check` gave
OPEN_PATHS = frozenset({"/health", "/livez", "/readyz", "/version", "/metrics"})
MAX_REQUEST_ID_CHARS = 128
_SLASHES = re.compile(r"/{2,}")
_UNCLEAN = re.compile(rb"[^A-Za-z0-9._:-]")


class KeyCheck:
    """Compares digests in constant time, all of them each time. No keys: everyone may pass."""

    def __init__(self, keys: Sequence[str], name: str, advice: str) -> None:
        """`name` is what such a key is called, `advice` tells who is refused what to do."""
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._name = name
        self._advice = advice

    def check(self, headers: Sequence[tuple[bytes, bytes]]) -> bytes:
        """Who asks: the same 16 bytes for the same key, which tell nobody the key; empty where none
        is needed. Raises `AuthenticationFailed`. Takes `Authorization: Bearer` and `x-api-key`."""
        if not self._digests:
            return b""
        holder = b""
        presented = presented_keys(headers)
        for given in presented:
            digest = hashlib.sha256(given).digest()
            for known in self._digests:
                if hmac.compare_digest(digest, known):
                    holder = _holder_of(given)
        if not holder:
            what = f"This {self._name} is not valid." if presented else f"No {self._name} was sent."
            raise AuthenticationFailed(f"{what} {self._advice}")
        return holder


def _holder_of(key: bytes) -> bytes:
    """Not its digest above: this one goes to nodes."""
    return hashlib.blake2b(key, digest_size=16, person=b"baton/holder").digest()


def presented_keys(headers: Sequence[tuple[bytes, bytes]]) -> list[bytes]:
    keys: list[bytes] = []
    for name, value in headers:
        if name == b"x-api-key":
            keys.append(value.strip())
        elif name == b"authorization" and value[:7].lower() == b"bearer ":
            keys.append(value[7:].strip())
    return keys


class Edge:
    """Wraps an application; see the module. `open_paths` need no key."""

    def __init__(
        self, app: ASGIApp, keys: KeyCheck, *, open_paths: frozenset[str] = OPEN_PATHS
    ) -> None:
        self._app = app
        self._keys = keys
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await _refuse_upgrade(scope, receive, send)
            return
        path = plain_path(scope["path"])
        request_id = request_id_of(scope["headers"])
        inner = {**scope, "path": path, "raw_path": path.encode(), REQUEST_ID: request_id}
        tagged = _Tagging(send, request_id.encode())
        with log_context(request_id=request_id):
            try:
                if path not in self._open_paths:
                    inner[KEY_HOLDER] = self._keys.check(scope["headers"])
                await self._app(inner, receive, tagged)
            except Exception as error:  # the last resort of a request
                known, named = as_serving_error(error), message_id(inner, request_id)
                log_refusal(known, path, status_of(known, named))
                if not tagged.has_started:
                    await send_error(tagged, known, named)


class _Tagging:
    """A `send` that puts the request's id on the answer's head."""

    __slots__ = ("_request_id", "_send", "has_started")

    def __init__(self, send: Send, request_id: bytes) -> None:
        self._send = send
        self._request_id = request_id
        self.has_started = False

    def __call__(self, message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            self.has_started = True
            tags = [(b"x-request-id", self._request_id), (b"request-id", self._request_id)]
            message = {**message, "headers": [*message.get("headers", ()), *tags]}
        return self._send(message)


def plain_path(path: str) -> str:
    return _SLASHES.sub("/", path).rstrip("/") or "/"


def request_id_of(headers: Sequence[tuple[bytes, bytes]]) -> str:
    """The client's id without characters that could break a log line or header; else a new one."""
    for name, value in headers:
        if name == b"x-request-id":
            cleaned = _UNCLEAN.sub(b"", value)[:MAX_REQUEST_ID_CHARS]
            if cleaned:
                return cleaned.decode()
    return secrets.token_hex(16)


async def _refuse_upgrade(scope: Scope, receive: Receive, send: Send) -> None:
    """There is nothing here for websockets."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008})
