"""A choice as a message of Anthropic's API, whole or as events.

A stream: `message_start` and the opening of the only content block come with the first token;
deltas; the block's end, `message_delta` with the reason of the ending, `message_stop`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cluster.request import FinishReason
from gateway.dialects.events import event
from gateway.dialects.messages_errors import message_error

if TYPE_CHECKING:
    from cluster.errors import ServingError
    from gateway.choice import Choice, Piece
    from gateway.generation import Generation

Json = dict[str, Any]


def message_object(generation: Generation, text: str) -> Json:
    """The whole answer."""
    (choice,) = generation.choices
    return {
        **_head(generation),
        "content": [{"type": "text", "text": text}],
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


def _ending(choice: Choice) -> Json:
    if choice.finish_reason is FinishReason.LENGTH:
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if isinstance(choice.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": choice.stop_reason}
    return {"stop_reason": "end_turn", "stop_sequence": None}


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

    def render(self, choice: Choice, piece: Piece) -> bytes:
        frames = b""
        if not self._has_begun and (choice.num_output_tokens > 0 or choice.is_finished):
            self._has_begun = True
            block = {"type": "text", "text": ""}
            frames = event({"type": "message_start", "message": _head(self._generation)})
            frames += event({"type": "content_block_start", "index": 0, "content_block": block})
        if piece.text:
            delta = {"type": "text_delta", "text": piece.text}
            frames += event({"type": "content_block_delta", "index": 0, "delta": delta})
        return frames

    def last(self) -> bytes:
        (choice,) = self._generation.choices
        ending = {
            "type": "message_delta",
            "delta": _ending(choice),
            "usage": _usage(self._generation),
        }
        return (
            event({"type": "content_block_stop", "index": 0})
            + event(ending)
            + event({"type": "message_stop"})
        )

    def error(self, error: ServingError) -> bytes:
        return event(message_error(error, self._generation.request.request_id))
