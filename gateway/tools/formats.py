"""How models write calls of tools, by the chat template that taught them.

hermes     <tool_call>{"name": ..., "arguments": {...}}</tool_call>, any number (Qwen, Hermes)
mistral    [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...], or, since its tokenizer v11, for
           each call [TOOL_CALLS]name[ARGS]{...}, maybe with [CALL_ID]... before [ARGS]
llama      {"name": ..., "parameters": {...}} at the beginning of a message, or behind
           <|python_tag|>; several with ; between. What looks like one behind words and without that
           mark is content: it may be an example, and models are taught to write nothing else
"""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from gateway.body import MAX_DEPTH, depth_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_ID_ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """`arguments` is JSON, as the client gets it."""

    id: str
    name: str
    arguments: str


Found = tuple[list[ToolCall], str]


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """`opening` begins what is to be read as calls, `closing` ends it; "": the end of the message.

    `parse` gives the calls that lead what is between them, and the text that follows these; no
    calls when they are not what they should be. `bare`: a message that begins with it is read as
    calls, too, of which it is part.
    """

    name: str
    opening: str
    closing: str
    parse: Callable[[str], Found]
    bare: str = ""


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"JSON has no {name}.")


# Models write line breaks into texts as they are, too.
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, strict=False)
_SEPARATORS = re.compile(r"[; \n\t\r]*")
_NAMED = re.compile(r"\s*\[TOOL_CALLS\]\s*([^\s\[\]{}]+)(?:\[CALL_ID\]\w*)?(?:\[ARGS\]\s*)?(?={)")


def _values(text: str, position: int = 0) -> Iterator[tuple[Any, int]]:
    """The JSON values that lead it from there, each with where it ends."""
    while separators := _SEPARATORS.match(text, position):
        try:
            value, position = _DECODER.raw_decode(text, separators.end())
        except (ValueError, RecursionError):  # whatever a model has been made to write
            return
        yield value, position


def _objects(text: str, no_arguments: object = None) -> Found:
    """One object or several, or a list of them. `no_arguments` stand for what is not there."""
    calls, end = list[ToolCall](), 0
    for value, after in _values(text):
        values = value if isinstance(value, list) else [value]
        made = [_call_of(each, no_arguments) for each in values]
        if None in made:
            break
        calls += [call for call in made if call is not None]
        end = after
    return calls, "" if _SEPARATORS.fullmatch(text, end) else text[end:]


def _only_objects(text: str) -> Found:
    calls, rest = _objects(text, no_arguments={})
    return ([], text) if rest.strip() else (calls, "")


def _objects_or_named(text: str) -> Found:
    """Older models of Mistral write the one, newer ones the other."""
    calls, rest = _objects(text, no_arguments={})
    return (calls, rest) if calls else _named(MISTRAL.opening + text)


def _named(text: str) -> Found:
    calls, end = list[ToolCall](), 0
    while head := _NAMED.match(text, end):
        arguments, after = next(_values(text, head.end()), (None, 0))
        call = _call_of({"name": head[1], "arguments": arguments})
        if call is None:
            break
        calls.append(call)
        end = after
    return calls, text[end:]


def _call_of(value: object, no_arguments: object = None) -> ToolCall | None:
    """None: not a call, or one that its client could not read. Models take one word for the other,
    and some write the arguments as a text that holds the object."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", no_arguments))
    try:
        if isinstance(arguments, str):
            arguments = _DECODER.decode(arguments)
        if not isinstance(arguments, dict) or depth_of(arguments) > MAX_DEPTH:
            return None
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        f"{value['name']}{written}".encode()  # half a character has no bytes
    except (ValueError, RecursionError):
        return None
    return ToolCall(new_call_id(), value["name"], written)


def new_call_id() -> str:
    """Nine letters and digits: Mistral's templates take no other id back."""
    return "".join(secrets.choice(_ID_ALPHABET) for _ in range(9))


HERMES = ToolFormat("hermes", "<tool_call>", "</tool_call>", _only_objects)
MISTRAL = ToolFormat("mistral", "[TOOL_CALLS]", "", _objects_or_named)
# Where no mark says that these are calls, one with a name alone may be anyone.
LLAMA = ToolFormat("llama", "<|python_tag|>", "", _objects, bare="{")

# What other families write between the marks of HERMES.
_OTHER_CALLS = ("<function=", "<arg_key>")


def format_of(template_source: str) -> ToolFormat | None:
    """None when the template takes no tools, or teaches a form that is not known here."""
    if "tools" not in template_source:
        return None
    if HERMES.opening in template_source:
        is_other = any(mark in template_source for mark in _OTHER_CALLS)
        return None if is_other else HERMES
    if MISTRAL.opening in template_source:
        return MISTRAL
    return LLAMA if '"parameters"' in template_source else None
