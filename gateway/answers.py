"""Answers as JSON, in OpenAI's shape: whole completions and usage; `logprob_answers` are part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from cluster.request import FinishReason
from gateway.logprob_answers import chat_logprob_parts, text_logprob_parts
from gateway.request import Route

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gateway.choice import Choice, Piece
    from gateway.detokenizer import TokenBytes
    from gateway.generation import Generation
    from gateway.held_answer import HeldAnswer
    from gateway.request import Request
    from gateway.tools.formats import ToolCall

Json = dict[str, Any]
_ID_PREFIX = {Route.CHAT: "chatcmpl-", Route.COMPLETIONS: "cmpl-"}


def answer_id(request: Request) -> str:
    return _ID_PREFIX[request.route] + request.request_id


def usage(generation: Generation) -> Json:
    """Prompts count once each, whatever `n` is."""
    num_prompt = generation.num_prompt_tokens
    num_output = generation.num_output_tokens
    num_cached = generation.num_cached_tokens
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {
            "cached_tokens": num_cached,
            "cache_write_tokens": num_prompt - num_cached,
        },
        "completion_tokens_details": {"reasoning_tokens": generation.num_thought_tokens},
    }


def answer_parts(
    generation: Generation, held: Sequence[HeldAnswer], token_bytes: TokenBytes
) -> Iterator[bytes]:
    """The whole answer as JSON, in parts that take a millisecond or two to make, or less."""
    request = generation.request
    head = {
        "id": answer_id(request),
        "object": "chat.completion" if request.route is Route.CHAT else "text_completion",
        "created": request.created,
        "model": request.model,
    }
    yield orjson.dumps(head)[:-1] + b',"choices":['
    for choice, whole in zip(generation.choices, held, strict=True):
        if choice.index:
            yield b","
        yield from _choice_parts(choice, whole, request, token_bytes)
    yield b'],"usage":' + orjson.dumps(usage(generation)) + b"}"


def _choice_parts(
    choice: Choice, whole: HeldAnswer, request: Request, token_bytes: TokenBytes
) -> Iterator[bytes]:
    is_chat = request.route is Route.CHAT
    piece = whole.piece()
    said: Json = {"index": choice.index}
    if is_chat:
        said["message"] = _message(piece)
    else:
        said["text"] = echoed(choice, request) + piece.text
    yield orjson.dumps(said)[:-1] + b',"logprobs":'
    if not request.wants_logprobs:
        yield b"null"
    elif is_chat:
        yield from chat_logprob_parts(whole, token_bytes)
    else:
        yield from text_logprob_parts(whole, token_bytes)
    rest = {**ending(choice), **token_id_fields(choice, piece, request, is_first=True)}
    yield b"," + orjson.dumps(rest)[1:]


def _message(piece: Piece) -> Json:
    message: Json = {"role": "assistant", "content": piece.text, "refusal": None}
    message |= thought_fields(piece)
    if piece.calls:
        message["content"] = piece.text or None
        message["tool_calls"] = [tool_call(call) for call in piece.calls]
    return message


def thought_fields(piece: Piece) -> Json:
    """Under both names that clients know."""
    if not piece.thought:
        return {}
    return {"reasoning": piece.thought, "reasoning_content": piece.thought}


def tool_call(call: ToolCall) -> Json:
    called = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": called}


def echoed(choice: Choice, request: Request) -> str:
    if not request.echo:
        return ""
    return request.prompts[choice.index // request.n].text or ""


def ending(choice: Choice) -> Json:
    reason = None if choice.finish_reason is None else choice.finish_reason.value
    if choice.num_calls and choice.finish_reason is FinishReason.STOP:
        reason = "tool_calls"
    return {"finish_reason": reason, "stop_reason": choice.stop_reason}


def token_id_fields(choice: Choice, piece: Piece, request: Request, *, is_first: bool) -> Json:
    """Only where asked for; the prompt's ids once, with the first of a choice's own."""
    if not request.return_token_ids:
        return {}
    if not is_first:
        return {"token_ids": piece.token_ids}
    prompt = request.prompts[choice.index // request.n]
    return {"prompt_token_ids": prompt.token_ids, "token_ids": piece.token_ids}
