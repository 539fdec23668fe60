"""Server-sent events: named, as both dialects stream them, and comments, for nobody to read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from collections.abc import Mapping

COMMENT = b": keep-alive\n\n"


def event(body: Mapping[str, Any]) -> bytes:
    """`body["type"]` is its name."""
    name: str = body["type"]
    return b"event: " + name.encode() + b"\ndata: " + orjson.dumps(body) + b"\n\n"
