"""A choice as a message of Anthropic's API, whole or as events.

A stream: `message_start` comes with the first token; then blocks, each opened, filled and closed:
text as it comes, a call of a tool at once; `message_delta` with the reason of the ending;
`message_stop`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from cluster.request import FinishReason
from gateway.dialects.events import event
from gateway.dialects.messages_errors import message_error

if TYPE_CHECKING:
    from cluster.errors import ServingError
    from gateway.choice import Choice, Piece
    from gateway.generation import Generation
    from gateway.tools.formats import ToolCall

Json = dict[str, Any]


def message_object(generation: Generation, piece: Piece) -> Json:
    """The whole answer. Its content is never empty."""
    (choice,) = generation.choices
    blocks: list[Json] = [{"type": "text", "text": piece.text}]
    if piece.calls and not piece.text:
        blocks = []
    for call in piece.calls:
        blocks.append({**_tool_use(call), "input": orjson.Fragment(call.arguments)})
    return {
        **_head(generation),
        "content": blocks,
        **_ending(choice),
        "usage": _usage(generation),
    }


def _head(generation: Generation) -> Json:
    request = generation.request
    return {
        "id": f"msg_{request.request_id}",
        "type": "message",
        "role": "assistant",
        "model": request.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": _usage(generation),
    }


def _tool_use(call: ToolCall) -> Json:
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}


def _ending(choice: Choice) -> Json:
    if choice.finish_reason is FinishReason.LENGTH:
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if isinstance(choice.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": choice.stop_reason}
    reason = "tool_use" if choice.num_calls else "end_turn"
    return {"stop_reason": reason, "stop_sequence": None}


def _usage(generation: Generation) -> Json:
    num_cached = generation.num_cached_tokens
    return {
        "input_tokens": generation.num_prompt_tokens - num_cached,
        "output_tokens": generation.num_output_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": num_cached,
    }


class MessagesFrames:
    """The events of one generation, which has one choice."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._has_begun = False
        self._num_blocks = 0
        self._is_text_open = False

    def render(self, choice: Choice, piece: Piece) -> bytes:
        frames = b""
        if not self._has_begun and (choice.num_output_tokens > 0 or choice.is_finished):
            self._has_begun = True
            frames = event({"type": "message_start", "message": _head(self._generation)})
        if piece.text:
            frames += self._text(piece.text)
        for call in piece.calls:
            frames += self._close_text()
            arguments = {"type": "input_json_delta", "partial_json": call.arguments}
            frames += self._open(_tool_use(call)) + self._delta(arguments) + self._close()
        return frames

    def last(self) -> bytes:
        (choice,) = self._generation.choices
        nothing = self._text("") if self._num_blocks == 0 else b""
        usage = _usage(self._generation)
        ending = {"type": "message_delta", "delta": _ending(choice), "usage": usage}
        return nothing + self._close_text() + event(ending) + event({"type": "message_stop"})

    def error(self, error: ServingError) -> bytes:
        return event(message_error(error, self._generation.request.request_id))

    def _text(self, text: str) -> bytes:
        frames = b""
        if not self._is_text_open:
            self._is_text_open = True
            frames = self._open({"type": "text", "text": ""})
        return frames + (self._delta({"type": "text_delta", "text": text}) if text else b"")

    def _close_text(self) -> bytes:
        if not self._is_text_open:
            return b""
        self._is_text_open = False
        return self._close()

    def _open(self, block: Json) -> bytes:
        self._num_blocks += 1
        return self._event("content_block_start", content_block=block)

    def _delta(self, delta: Json) -> bytes:
        return self._event("content_block_delta", delta=delta)

    def _close(self) -> bytes:
        return self._event("content_block_stop")

    def _event(self, kind: str, **fields: Json) -> bytes:
        """Of the block that was opened last."""
        return event({"type": kind, "index": self._num_blocks - 1, **fields})
