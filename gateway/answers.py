"""Answers as JSON objects, in OpenAI's shape: whole completions, usage and log-probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cluster.request import FinishReason
from gateway.request import Route

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.request import TokenLogprobs
    from gateway.choice import Choice, Piece
    from gateway.detokenizer import TokenBytes
    from gateway.generation import Generation
    from gateway.request import Request
    from gateway.tools.formats import ToolCall

Json = dict[str, Any]
# JSON has no infinity; this is what OpenAI and vLLM write for impossible tokens.
LOWEST_LOGPROB = -9999.0

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
        "completion_tokens_details": {
            "reasoning_tokens": sum(choice.num_thought_tokens for choice in generation.choices)
        },
    }


def whole_answer(generation: Generation, pieces: Sequence[Piece], token_bytes: TokenBytes) -> Json:
    """`pieces[i]` is all of choice `i`."""
    request = generation.request
    is_chat = request.route is Route.CHAT
    build = _chat_choice if is_chat else _text_choice
    return {
        "id": answer_id(request),
        "object": "chat.completion" if is_chat else "text_completion",
        "created": request.created,
        "model": request.model,
        "choices": [
            build(choice, piece, request, token_bytes)
            for choice, piece in zip(generation.choices, pieces, strict=True)
        ],
        "usage": usage(generation),
    }


def _chat_choice(choice: Choice, piece: Piece, request: Request, token_bytes: TokenBytes) -> Json:
    logprobs = chat_logprobs(piece, token_bytes) if request.wants_logprobs else None
    return {
        "index": choice.index,
        "message": _message(piece),
        "logprobs": logprobs,
        **ending(choice),
        **token_id_fields(choice, piece, request, is_first=True),
    }


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


def _text_choice(choice: Choice, piece: Piece, request: Request, token_bytes: TokenBytes) -> Json:
    logprobs = text_logprobs(piece, token_bytes, 0) if request.wants_logprobs else None
    return {
        "index": choice.index,
        "text": echoed(choice, request) + piece.text,
        "logprobs": logprobs,
        **ending(choice),
        **token_id_fields(choice, piece, request, is_first=True),
    }


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


def chat_logprobs(piece: Piece, token_bytes: TokenBytes) -> Json:
    content = []
    for token_id, entry in zip(piece.token_ids, piece.logprobs, strict=True):
        row = _chat_token(token_id, entry.logprob, token_bytes)
        row["top_logprobs"] = [_chat_token(t, value, token_bytes) for t, value in entry.top]
        content.append(row)
    return {"content": content, "refusal": None}


def _chat_token(token_id: int, logprob: float, token_bytes: TokenBytes) -> Json:
    data = token_bytes[token_id]
    return {
        "token": data.decode(errors="replace"),
        "logprob": max(logprob, LOWEST_LOGPROB),
        "bytes": list(data),
    }


def text_logprobs(piece: Piece, token_bytes: TokenBytes, offset: int) -> Json:
    """`offset` is that of the first token in the text of its choice, in characters."""
    tokens = [token_bytes[token_id].decode(errors="replace") for token_id in piece.token_ids]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [max(entry.logprob, LOWEST_LOGPROB) for entry in piece.logprobs],
        "top_logprobs": [
            _top_of(token, entry, token_bytes)
            for token, entry in zip(tokens, piece.logprobs, strict=True)
        ],
        "text_offset": offsets,
    }


def _top_of(token: str, entry: TokenLogprobs, token_bytes: TokenBytes) -> dict[str, float]:
    """The chosen token is among them, whether likely or not."""
    top = {
        token_bytes[token_id].decode(errors="replace"): max(value, LOWEST_LOGPROB)
        for token_id, value in entry.top
    }
    top.setdefault(token, max(entry.logprob, LOWEST_LOGPROB))
    return top
