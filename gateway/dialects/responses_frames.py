"""A choice as an object of OpenAI's Responses, whole or as events.

A stream: `created`, `in_progress`, the item and its part are opened with the first token; deltas;
then all that was opened is closed, each with the whole text; `completed` or `incomplete` is last.
An error in between is an `error` event and `response.failed`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cluster.request import FinishReason
from gateway.answers import usage
from gateway.dialects.events import event

if TYPE_CHECKING:
    from cluster.errors import ServingError
    from gateway.choice import Choice, Piece
    from gateway.generation import Generation

Json = dict[str, Any]
PLACE = {"output_index": 0, "content_index": 0}


def response_object(generation: Generation, text: str) -> Json:
    """The whole answer."""
    (choice,) = generation.choices
    is_cut = choice.finish_reason is FinishReason.LENGTH
    status = "incomplete" if is_cut else "completed"
    return {
        **_head(generation, status),
        "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "output": [_item(generation, status, [_part(text)])],
        "usage": _usage(generation),
    }


def _head(generation: Generation, status: str) -> Json:
    request = generation.request
    return {
        "id": f"resp_{request.request_id}",
        "object": "response",
        "created_at": request.created,
        "status": status,
        "error": None,
        "incomplete_details": None,
        "model": request.model,
        "output": [],
        "parallel_tool_calls": False,
        "tool_choice": "none",
        "tools": [],
        "truncation": "disabled",
        "store": False,
        "usage": None,
    }


def _item(generation: Generation, status: str, content: list[Json]) -> Json:
    name = _item_id(generation)
    return {
        "id": name,
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": content,
    }


def _item_id(generation: Generation) -> str:
    return f"msg_{generation.request.request_id}"


def _part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


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
        self._text = ""
        self._number = 0
        self._has_begun = False

    def render(self, choice: Choice, piece: Piece) -> bytes:
        frames = b""
        if not self._has_begun and (choice.num_output_tokens > 0 or choice.is_finished):
            self._has_begun = True
            frames = self._opening()
        if piece.text:
            self._text += piece.text
            delta = {**self._part_place(), "delta": piece.text, "logprobs": []}
            frames += self._event("output_text.delta", delta)
        return frames

    def last(self) -> bytes:
        whole = response_object(self._generation, self._text)
        place, (item,) = self._part_place(), whole["output"]
        return (
            self._event("output_text.done", {**place, "text": self._text, "logprobs": []})
            + self._event("content_part.done", {**place, "part": _part(self._text)})
            + self._event("output_item.done", {"output_index": 0, "item": item})
            + self._event(whole["status"], {"response": whole})
        )

    def error(self, error: ServingError) -> bytes:
        said = {"code": error.code, "message": error.message}
        failed = {**_head(self._generation, "failed"), "error": said}
        number = self._next_number()
        told = {"type": "error", **said, "param": error.param, "sequence_number": number}
        return event(told) + self._event("failed", {"response": failed})

    def _opening(self) -> bytes:
        head = {"response": _head(self._generation, "in_progress")}
        item = _item(self._generation, "in_progress", [])
        return (
            self._event("created", head)
            + self._event("in_progress", head)
            + self._event("output_item.added", {"output_index": 0, "item": item})
            + self._event("content_part.added", {**self._part_place(), "part": _part("")})
        )

    def _part_place(self) -> Json:
        return {"item_id": _item_id(self._generation), **PLACE}

    def _event(self, name: str, fields: Json) -> bytes:
        return event({"type": f"response.{name}", "sequence_number": self._next_number(), **fields})

    def _next_number(self) -> int:
        self._number += 1
        return self._number - 1
