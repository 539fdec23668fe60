"""Named server-sent events, which both dialects stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from collections.abc import Mapping


def event(body: Mapping[str, Any]) -> bytes:
    """`body["type"]` is its name."""
    name: str = body["type"]
    return b"event: " + name.encode() + b"\ndata: " + orjson.dumps(body) + b"\n\n"
