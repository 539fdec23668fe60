"""A choice as an object of OpenAI's Responses, whole or as events.

A stream: `created` and `in_progress` come with the first token; then items, each opened, filled and
closed: thoughts and a message as their text comes, a call of a tool at once; `completed` or
`incomplete` is last, with all that was streamed. An error in between is an `error` event and
`response.failed`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.request import FinishReason
from gateway.answers import usage
from gateway.dialects.events import COMMENT, event

if TYPE_CHECKING:
    from cluster.errors import ServingError
    from gateway.choice import Choice, Piece
    from gateway.generation import Generation
    from gateway.tools.formats import ToolCall

Json = dict[str, Any]


def response_object(generation: Generation, piece: Piece) -> Json:
    """The whole answer: what its stream would end with."""
    frames = ResponsesFrames(generation)
    frames.render(generation.choices[0], piece)
    frames.last()
    return frames.whole()


def _head(generation: Generation, status: str) -> Json:
    request = generation.request
    return {
        "id": f"resp_{request.request_id}",
        "object": "response",
        "created_at": request.created,
        "completed_at": None,
        "status": status,
        "error": None,
        "incomplete_details": None,
        "model": request.model,
        "output": [],
        **request.repeated,
        "usage": None,
    }


@dataclass(frozen=True, slots=True)
class _Kind:
    """An item of words: what it, its one part and the events of that are made of."""

    prefix: str  # of its id
    item: Json
    part: Json
    events: str
    of_event: Json


_MESSAGE = _Kind(
    prefix="msg",
    item={"type": "message", "role": "assistant"},
    part={"type": "output_text", "annotations": [], "logprobs": []},
    events="output_text",
    of_event={"logprobs": []},
)
_REASONING = _Kind(
    prefix="rs",
    item={"type": "reasoning", "summary": [], "encrypted_content": None},
    part={"type": "reasoning_text"},
    events="reasoning_text",
    of_event={},
)


def _usage(generation: Generation) -> Json:
    counts = usage(generation)
    return {
        "input_tokens": counts["prompt_tokens"],
        "input_tokens_details": counts["prompt_tokens_details"],
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": counts["completion_tokens_details"],
        "total_tokens": counts["total_tokens"],
    }


class ResponsesFrames:
    """The events of one generation, which has one choice."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._number = 0
        self._has_begun = False
        self._output: list[Json] = []  # the items that are closed
        self._kind: _Kind | None = None  # of the words that are open
        self._words = ""

    def render(self, choice: Choice, piece: Piece) -> bytes:
        frames = b""
        if not self._has_begun and (choice.num_output_tokens > 0 or choice.is_finished):
            self._has_begun = True
            head = {"response": _head(self._generation, "in_progress")}
            frames = self._event("created", head) + self._event("in_progress", head)
        if piece.thought:
            frames += self._say(_REASONING, piece.thought)
        if piece.text:
            frames += self._say(_MESSAGE, piece.text)
        for call in piece.calls:
            frames += self._close_words("completed") + self._call(call)
        return frames

    def last(self) -> bytes:
        nothing = b"" if self._output or self._kind else self._say(_MESSAGE, "")
        closing = nothing + self._close_words(self._status)
        return closing + self._event(self._status, {"response": self.whole()})

    def error(self, error: ServingError) -> bytes:
        said = {"code": error.code, "message": error.message}
        failed = {**_head(self._generation, "failed"), "error": said, "output": self._output}
        number = self._next_number()
        told = {"type": "error", **said, "param": error.param, "sequence_number": number}
        return event(told) + self._event("failed", {"response": failed})

    def keep_alive(self) -> bytes:
        return COMMENT

    def whole(self) -> Json:
        """After `last`."""
        is_cut = self._status == "incomplete"
        return {
            **_head(self._generation, self._status),
            "completed_at": None if is_cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": self._output,
            "usage": _usage(self._generation),
        }

    @property
    def _status(self) -> str:
        (choice,) = self._generation.choices
        return "incomplete" if choice.finish_reason is FinishReason.LENGTH else "completed"

    # ---- items ---------------------------------------------------------------------------

    def _say(self, kind: _Kind, words: str) -> bytes:
        frames = b""
        if self._kind is not kind:
            frames = self._close_words("completed")
            self._kind, self._words = kind, ""
            frames += self._item_event("output_item.added", item=self._item("in_progress", []))
            frames += self._part_event("content_part.added", part={**kind.part, "text": ""})
        self._words += words
        if not words:
            return frames
        return frames + self._part_event(f"{kind.events}.delta", delta=words, **kind.of_event)

    def _close_words(self, status: str) -> bytes:
        kind, words = self._kind, self._words
        if kind is None:
            return b""
        part = {**kind.part, "text": words}
        item = self._item(status, [part])
        frames = (
            self._part_event(f"{kind.events}.done", text=words, **kind.of_event)
            + self._part_event("content_part.done", part=part)
            + self._item_event("output_item.done", item=item)
        )
        self._output.append(item)
        self._kind = None
        return frames

    def _call(self, call: ToolCall) -> bytes:
        item = {
            "id": f"fc_{call.id}",
            "type": "function_call",
            "status": "completed",
            "call_id": call.id,
            "name": call.name,
            "arguments": call.arguments,
        }
        opened = {**item, "status": "in_progress", "arguments": ""}
        name, arguments = {"item_id": item["id"]}, call.arguments
        frames = (
            self._item_event("output_item.added", item=opened)
            + self._item_event("function_call_arguments.delta", **name, delta=arguments)
            + self._item_event("function_call_arguments.done", **name, arguments=arguments)
            + self._item_event("output_item.done", item=item)
        )
        self._output.append(item)
        return frames

    def _item(self, status: str, content: list[Json]) -> Json:
        """Of the words that are open."""
        kind = self._kind or _MESSAGE
        return {"id": self._item_id, **kind.item, "status": status, "content": content}

    @property
    def _item_id(self) -> str:
        prefix = (self._kind or _MESSAGE).prefix
        return f"{prefix}_{self._generation.request.request_id}_{len(self._output)}"

    # ---- events --------------------------------------------------------------------------

    def _part_event(self, name: str, **fields: Any) -> bytes:
        return self._item_event(name, item_id=self._item_id, content_index=0, **fields)

    def _item_event(self, name: str, **fields: Any) -> bytes:
        """Of the item that is open."""
        return self._event(name, {"output_index": len(self._output), **fields})

    def _event(self, name: str, fields: Json) -> bytes:
        number = self._next_number()
        return event({"type": f"response.{name}", "sequence_number": number, **fields})

    def _next_number(self) -> int:
        self._number += 1
        return self._number - 1
