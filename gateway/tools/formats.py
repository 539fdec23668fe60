"""How models write calls of tools, by the chat template that taught them.

hermes     <tool_call>{"name": ..., "arguments": {...}}</tool_call>, any number (Qwen, Hermes)
mistral    [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...] to the end of the message
llama      {"name": ..., "parameters": {...}} as the whole message; several with ; between
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from gateway.body import MAX_DEPTH, depth_of

if TYPE_CHECKING:
    from collections.abc import Callable

_ID_ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """`arguments` is JSON, as the client gets it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """`opening` begins what is to be read as calls, `closing` ends it; "": the end of the message.

    `parse` gives the calls between them, none when they are not what they should be. `leads`: only
    a message that begins with `opening` has calls, and `opening` is part of them.
    """

    name: str
    opening: str
    closing: str
    parse: Callable[[str], list[ToolCall]]
    leads: bool = False
    is_special: bool = False  # `opening` is a special token, which clients else do not see


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"JSON has no {name}.")


def _objects_of(text: str) -> list[Any]:
    """JSON values with nothing, blanks or semicolons between; none when something else is there."""
    decoder, found, position = json.JSONDecoder(parse_constant=_refuse_constant), [], 0
    text = text.strip()
    while position < len(text):
        value, position = decoder.raw_decode(text, position)
        found.append(value)
        while position < len(text) and text[position] in "; \n\t\r":
            position += 1
    return found


def _parser_of(key: str) -> Callable[[str], list[ToolCall]]:
    def parse(text: str) -> list[ToolCall]:
        try:
            values = _objects_of(text)
            if len(values) == 1 and isinstance(values[0], list):
                values = values[0]
            calls = [_call_of(value, key) for value in values]
        except (ValueError, RecursionError):  # whatever a model has been made to write
            return []
        return [] if None in calls else [call for call in calls if call is not None]

    return parse


def _call_of(value: object, key: str) -> ToolCall | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get(key, {})
    if not isinstance(arguments, dict) or depth_of(arguments) > MAX_DEPTH:
        return None
    return ToolCall(new_call_id(), value["name"], json.dumps(arguments, ensure_ascii=False))


def new_call_id() -> str:
    """Nine letters and digits: Mistral's templates take no other id back."""
    return "".join(secrets.choice(_ID_ALPHABET) for _ in range(9))


HERMES = ToolFormat("hermes", "<tool_call>", "</tool_call>", _parser_of("arguments"))
MISTRAL = ToolFormat("mistral", "[TOOL_CALLS]", "", _parser_of("arguments"), is_special=True)
LLAMA = ToolFormat("llama", "{", "", _parser_of("parameters"), leads=True)


def format_of(template_source: str) -> ToolFormat | None:
    """None when the template takes no tools, or teaches a form that is not known here."""
    if "tools" not in template_source:
        return None
    if HERMES.opening in template_source:
        return HERMES
    if MISTRAL.opening in template_source:
        return MISTRAL
    return LLAMA if '"parameters"' in template_source else None
