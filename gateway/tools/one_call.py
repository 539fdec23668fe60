"""Templates that take one call in a message, as Llama 3's, and answers that held several.

1. `takes_one_call` finds out by trying, at start.
2. `one_call_each` writes an earlier message with several calls as several messages with one, each
   with its result behind it: as if the model had made one call after the other.
"""

from __future__ import annotations

from itertools import islice, takewhile
from typing import TYPE_CHECKING, Any

from cluster.errors import ServingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Message = dict[str, Any]


def takes_one_call(render: Callable[[list[Message]], str]) -> bool:
    return _fits(render, 1) and not _fits(render, 2)


def _fits(render: Callable[[list[Message]], str], num_calls: int) -> bool:
    ids = [f"call0000{index}" for index in range(num_calls)]
    function = {"name": "f", "arguments": {}}
    calls = [{"id": one, "type": "function", "function": function} for one in ids]
    results = [{"role": "tool", "tool_call_id": one, "name": "f", "content": "x"} for one in ids]
    calling = {"role": "assistant", "content": "", "tool_calls": calls}
    try:
        render([{"role": "user", "content": "x"}, calling, *results])
    except ServingError:
        return False
    return True


def one_call_each(messages: Sequence[Message]) -> Iterator[Message]:
    position = 0
    while position < len(messages):
        message = messages[position]
        position += 1
        if len(message.get("tool_calls", ())) < 2:
            yield message
            continue
        results = list(takewhile(_is_result, islice(messages, position, None)))
        position += len(results)
        yield from _one_by_one(message, results)


def _is_result(message: Message) -> bool:
    return bool(message["role"] == "tool")


def _one_by_one(message: Message, results: Sequence[Message]) -> Iterator[Message]:
    """The words of the message come with its first call; results of no call of it come last."""
    by_call: dict[str | None, list[Message]] = {}
    for result in results:
        by_call.setdefault(result.get("tool_call_id"), []).append(result)
    for call in message["tool_calls"]:
        yield {**message, "tool_calls": [call]}
        yield from by_call.pop(call["id"], ())
        message = {"role": message["role"], "content": ""}
    for others in by_call.values():
        yield from others
