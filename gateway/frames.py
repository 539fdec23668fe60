"""Server-sent events of one answer, as bytes.

What does not change over a stream is rendered once; a token costs one `orjson.dumps` of its
text between two constants. Per choice a chat stream is: a role frame with the first token,
text frames, one finish frame. A plain completion has no role and ends in its last text frame.
All fields that clients may look for are there, as null when they say nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from gateway.answers import (
    answer_id,
    echoed,
    ending,
    thought_fields,
    token_id_fields,
    tool_call,
    usage,
)
from gateway.choice import Piece
from gateway.dialects.events import COMMENT
from gateway.http_errors import error_body
from gateway.logprob_answers import chat_logprobs, text_logprobs
from gateway.request import Route

if TYPE_CHECKING:
    from cluster.errors import ServingError
    from gateway.choice import Choice
    from gateway.detokenizer import TokenBytes
    from gateway.generation import Generation

DONE = b"data: [DONE]\n\n"
_END = b"}\n\n"


def error_frame(error: ServingError) -> bytes:
    return b"data: " + orjson.dumps(error_body(error)) + b"\n\n"


class Frames:
    """The frames of one generation. Call `render` with each piece, then `last` once."""

    def __init__(self, generation: Generation, token_bytes: TokenBytes) -> None:
        request = generation.request
        self._generation = generation
        self._request = request
        self._token_bytes = token_bytes
        self._is_chat = request.route is Route.CHAT
        kind = b"chat.completion.chunk" if self._is_chat else b"text_completion"
        self._head = b"".join(
            [
                b'data: {"id":' + orjson.dumps(answer_id(request)),
                b',"object":"' + kind + b'","created":' + str(request.created).encode(),
                b',"model":' + orjson.dumps(request.model) + b',"choices":[',
            ]
        )
        opening = b',"delta":{"content":' if self._is_chat else b',"text":'
        closing = b"}" if self._is_chat else b""
        self._text_heads = [
            self._head + b'{"index":' + str(choice.index).encode() + opening
            for choice in generation.choices
        ]
        self._null_usage = b',"usage":null' if request.stream.include_usage else b""
        self._text_tail = closing + b',"logprobs":null,"finish_reason":null}]'
        self._is_plain = not (
            request.wants_logprobs
            or request.return_token_ids
            or request.stream.continuous_usage
            or request.text.tool_format
            or request.text.thought_marks
        )
        self._begun = [False] * len(generation.choices)
        self._has_content = [False] * len(generation.choices)
        self._held = [Piece() for _ in generation.choices]
        self._offsets = [0] * len(generation.choices)
        self._num_calls = [0] * len(generation.choices)

    def render(self, choice: Choice, piece: Piece) -> bytes:
        """The frames for what is new in one choice; empty when nothing is to be shown yet."""
        index = choice.index
        is_over = choice.finish_reason is not None
        begins = not self._begun[index] and (choice.num_output_tokens > 0 or is_over)
        if begins:
            self._begun[index] = True
        if self._is_plain and not begins and not is_over:
            if not piece.text:
                return b""
            text = orjson.dumps(piece.text)
            return self._text_heads[index] + text + self._text_tail + self._null_usage + _END
        first = self._first(choice) if begins else b""
        return first + self._rest(choice, self._gathered(choice, piece), is_over=is_over)

    def last(self) -> bytes:
        """After all choices have ended well."""
        if not self._request.stream.include_usage:
            return DONE
        total = orjson.dumps(usage(self._generation))
        return self._head + b'],"usage":' + total + _END + DONE

    def error(self, error: ServingError) -> bytes:
        """Instead of `last`, when it ended badly."""
        return error_frame(error) + DONE

    def keep_alive(self) -> bytes:
        return COMMENT

    def _first(self, choice: Choice) -> bytes:
        if self._is_chat:
            return self._frame(choice, {"delta": {"role": "assistant", "content": ""}})
        prompt = echoed(choice, self._request)
        return self._frame(choice, {"text": prompt}) if prompt else b""

    def _gathered(self, choice: Choice, piece: Piece) -> Piece:
        """Token ids and log-probabilities wait for the text that their tokens belong to."""
        held = self._held[choice.index]
        held.extend(piece)
        return held

    def _rest(self, choice: Choice, held: Piece, *, is_over: bool) -> bytes:
        has_content = bool(held.text or held.calls or held.thought or (is_over and held.token_ids))
        merges_ending = is_over and not self._is_chat
        frames = b""
        if has_content or merges_ending:
            fields = self._content(choice, held)
            if merges_ending:
                fields.update(ending(choice))
            if held.thought:
                frames = self._frame(choice, {"delta": thought_fields(held)})
            if fields.keys() != {"delta"} or held.text or not (held.calls or held.thought):
                frames += self._frame(choice, fields)
            frames += self._calls(choice, held)
            self._held[choice.index] = Piece()
        if is_over and self._is_chat:
            frames += self._frame(choice, {"delta": {}, **ending(choice)})
        return frames

    def _calls(self, choice: Choice, piece: Piece) -> bytes:
        """Two frames for each: who is called, with what."""
        frames = b""
        for call in piece.calls:
            number = self._num_calls[choice.index]
            self._num_calls[choice.index] += 1
            whole = tool_call(call)
            opening = {**whole, "function": {"name": call.name, "arguments": ""}}
            for part in (opening, {"function": {"arguments": call.arguments}}):
                delta = {"tool_calls": [{"index": number, **part}]}
                frames += self._frame(choice, {"delta": delta})
        return frames

    def _content(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        is_first = not self._has_content[choice.index]
        self._has_content[choice.index] = True
        fields: dict[str, Any] = token_id_fields(choice, piece, self._request, is_first=is_first)
        if self._is_chat:
            fields["delta"] = {"content": piece.text}
            if self._request.wants_logprobs:
                fields["logprobs"] = chat_logprobs(piece, self._token_bytes)
            return fields
        fields["text"] = piece.text
        if self._request.wants_logprobs:
            offset = self._offsets[choice.index]
            fields["logprobs"] = text_logprobs(piece, self._token_bytes, offset)
            self._offsets[choice.index] = offset + sum(map(len, fields["logprobs"]["tokens"]))
        return fields

    def _frame(self, choice: Choice, fields: dict[str, Any]) -> bytes:
        content = "delta" if self._is_chat else "text"
        body = {
            "index": choice.index,
            content: fields.pop(content),
            "logprobs": None,
            "finish_reason": None,
            **fields,
        }
        return self._head + orjson.dumps(body) + b"]" + self._usage() + _END

    def _usage(self) -> bytes:
        if self._request.stream.continuous_usage:
            return b',"usage":' + orjson.dumps(usage(self._generation))
        return self._null_usage
