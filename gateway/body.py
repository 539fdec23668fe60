"""The body of a request: read within its limits, then parsed.

The size is enforced while reading, before anything is parsed or kept; the type and the nesting
before any field is looked at.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import orjson

from cluster.errors import (
    Cancelled,
    InvalidRequest,
    RequestTimeout,
    RequestTooLarge,
    UnsupportedMediaType,
)
from gateway.lost_clients import CLIENT_GONE

if TYPE_CHECKING:
    from starlette.types import Receive, Scope

MAX_DEPTH = 32
_FORM = b"application/x-www-form-urlencoded"  # what curl sends when it is not told
_MAX_SHOWN = 80


async def read_object(
    scope: Scope, receive: Receive, *, max_bytes: int, timeout_seconds: float
) -> dict[str, Any]:
    """The JSON object in the body. Raises the typed error for whatever else is there."""
    headers = dict(scope["headers"])
    _check_media_type(headers)
    _check_encoding(headers)
    length = headers.get(b"content-length", b"")
    if length.isdigit() and int(length) > max_bytes:
        raise _too_large(max_bytes)
    try:
        async with asyncio.timeout(timeout_seconds):
            body = await _read(receive, max_bytes)
    except TimeoutError as error:
        raise RequestTimeout("The request body did not arrive in time.") from error
    return parse_object(body)


def parse_object(body: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error.msg}.") from error
    if not isinstance(value, dict):
        raise InvalidRequest("The body must be a JSON object.")
    # Fewer brackets than the limit cannot nest deeper; counting them is much cheaper.
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH and depth_of(value) > MAX_DEPTH:
        raise InvalidRequest(f"The body nests deeper than {MAX_DEPTH} levels.")
    return value


def _check_media_type(headers: dict[bytes, bytes]) -> None:
    given = headers.get(b"content-type", b"application/json")
    media_type = given.split(b";")[0].strip().lower()
    if media_type != b"application/json" and not media_type.endswith(b"+json"):
        hint = " With curl: -H 'Content-Type: application/json'." if media_type == _FORM else ""
        raise UnsupportedMediaType(
            f"The content type must be application/json, not {_shown(media_type)}.{hint}"
        )


def _check_encoding(headers: dict[bytes, bytes]) -> None:
    coding = headers.get(b"content-encoding", b"").strip().lower()
    if coding not in (b"", b"identity"):
        raise UnsupportedMediaType(
            f"A body with the content encoding {_shown(coding)} is not read; send it plain."
        )


def _shown(header: bytes) -> str:
    return ascii(header[:_MAX_SHOWN].decode("latin-1"))


async def _read(receive: Receive, max_bytes: int) -> bytes:
    chunks: list[bytes] = []
    num_bytes = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Cancelled("The client left before its request was complete.", reason=CLIENT_GONE)
        chunk = message.get("body", b"")
        num_bytes += len(chunk)
        if num_bytes > max_bytes:
            raise _too_large(max_bytes)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


def _too_large(max_bytes: int) -> RequestTooLarge:
    return RequestTooLarge(f"The request body is larger than {max_bytes} bytes.")


def depth_of(value: object) -> int:
    """Without recursion: the parser allows more levels than Python's stack should hold."""
    depth = 0
    level: list[object] = [value]
    while level:
        depth += 1
        below: list[object] = []
        for container in level:
            children = container.values() if isinstance(container, dict) else container
            below += [c for c in children if type(c) is dict or type(c) is list]  # type: ignore[attr-defined]
        level = below
    return depth
