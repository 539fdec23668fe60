"""A choice as a message of Anthropic's API, whole or as events.

A stream: `message_start` comes with the first token; then blocks, each opened, filled and closed:
thoughts and text as they come, a call of a tool at once; `message_delta` with the reason of the
ending; `message_stop`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from cluster.request import FinishReason
from gateway.dialects.events import COMMENT, event
from gateway.dialects.messages_errors import message_error

if TYPE_CHECKING:
    from cluster.errors import ServingError
    from gateway.choice import Choice, Piece
    from gateway.generation import Generation
    from gateway.tools.formats import ToolCall

Json = dict[str, Any]
# Thoughts have one, and clients drop those without. Whoever sends them back is believed.
SIGNATURE = "unsigned"


def message_object(generation: Generation, piece: Piece) -> Json:
    """The whole answer. Its content is never empty."""
    (choice,) = generation.choices
    blocks: list[Json] = []
    if piece.thought:
        blocks.append({"type": "thinking", "thinking": piece.thought, "signature": SIGNATURE})
    if piece.text or not (piece.calls or piece.thought):
        blocks.append({"type": "text", "text": piece.text})
    blocks += [
        {**_tool_use(call), "input": orjson.Fragment(call.arguments)} for call in piece.calls
    ]
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
        "output_tokens_details": {"thinking_tokens": generation.num_thought_tokens},
    }


class MessagesFrames:
    """The events of one generation, which has one choice."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._has_begun = False
        self._num_blocks = 0
        self._open_kind = ""  # of the block that is open; "": none is

    def render(self, choice: Choice, piece: Piece) -> bytes:
        frames = b""
        if not self._has_begun and (choice.num_output_tokens > 0 or choice.is_finished):
            self._has_begun = True
            frames = event({"type": "message_start", "message": _head(self._generation)})
        if piece.thought:
            frames += self._say("thinking", piece.thought)
        if piece.text:
            frames += self._say("text", piece.text)
        for call in piece.calls:
            frames += self._close_words()
            arguments = {"type": "input_json_delta", "partial_json": call.arguments}
            frames += self._open(_tool_use(call)) + self._delta(arguments) + self._close()
        return frames

    def last(self) -> bytes:
        (choice,) = self._generation.choices
        nothing = self._say("text", "") if self._num_blocks == 0 else b""
        usage = _usage(self._generation)
        ending = {"type": "message_delta", "delta": _ending(choice), "usage": usage}
        return nothing + self._close_words() + event(ending) + event({"type": "message_stop"})

    def error(self, error: ServingError) -> bytes:
        return event(message_error(error, self._generation.request.request_id))

    def keep_alive(self) -> bytes:
        """An event, because clients end a stream without any, as one is while a long call comes.
        None may stand before the first."""
        return event({"type": "ping"}) if self._has_begun else COMMENT

    def _say(self, kind: str, words: str) -> bytes:
        """In a block of this kind, `text` or `thinking`, whose words have the same name."""
        frames = b""
        if self._open_kind != kind:
            unsigned = {"signature": ""} if kind == "thinking" else {}
            frames = self._close_words() + self._open({"type": kind, kind: "", **unsigned})
            self._open_kind = kind
        return frames + (self._delta({"type": f"{kind}_delta", kind: words}) if words else b"")

    def _close_words(self) -> bytes:
        kind, self._open_kind = self._open_kind, ""
        if not kind:
            return b""
        signed = {"type": "signature_delta", "signature": SIGNATURE}
        return (self._delta(signed) if kind == "thinking" else b"") + self._close()

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
