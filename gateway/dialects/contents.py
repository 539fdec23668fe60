"""Content of a message: a text, or a list of typed parts of which the text is taken."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.errors import InvalidRequest, Unsupported

if TYPE_CHECKING:
    from collections.abc import Set


def text_of(content: object, path: str, *, texts: Set[str], skipped: Set[str] = frozenset()) -> str:
    """`texts`: types of parts whose text counts. `skipped`: types that say nothing to a model."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"{path} must be text or a list of parts.", param=path)
    parts = [
        _part_text(part, f"{path}[{index}]", texts)
        for index, part in enumerate(content)
        if _type_of(part, f"{path}[{index}]") not in skipped
    ]
    return "\n".join(parts)


def _type_of(part: object, path: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise InvalidRequest(f"{path} must be an object with a type.", param=path)
    return kind


def _part_text(part: dict[str, object], path: str, texts: Set[str]) -> str:
    if part["type"] not in texts:
        raise Unsupported("Only text is supported here.", param=f"{path}.type")
    if not isinstance(part.get("text"), str):
        raise InvalidRequest(f"{path}.text must be text.", param=f"{path}.text")
    return str(part["text"])
