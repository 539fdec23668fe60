"""Log-probabilities as JSON, in OpenAI's two shapes: of what is new in a stream at once, of a whole
answer in parts, because it may have millions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import orjson

from cluster.request import TokenLogprobs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gateway.choice import Piece
    from gateway.detokenizer import TokenBytes
    from gateway.held_answer import HeldAnswer

Json = dict[str, Any]
# Of a few tokens.
Rows = Callable[[Sequence[int], Sequence[TokenLogprobs]], list[Any]]
# JSON has no infinity; this is what OpenAI and vLLM write for impossible tokens.
LOWEST_LOGPROB = -9999.0
TOKENS_OF_A_PART = 48  # with twenty others for each, it takes a millisecond or two


# ---- chats -------------------------------------------------------------------------------


def chat_logprobs(piece: Piece, token_bytes: TokenBytes) -> Json:
    rows = _chat_rows(token_bytes)(piece.token_ids, piece.logprobs)
    return {"content": rows, "refusal": None}


def chat_logprob_parts(whole: HeldAnswer, token_bytes: TokenBytes) -> Iterator[bytes]:
    yield b'{"content":['
    yield from _parts(whole, _chat_rows(token_bytes))
    yield b'],"refusal":null}'


def _chat_rows(token_bytes: TokenBytes) -> Rows:
    def rows(token_ids: Sequence[int], entries: Sequence[TokenLogprobs]) -> list[Json]:
        return [
            {
                **_chat_token(token_id, entry.logprob, token_bytes),
                "top_logprobs": [_chat_token(t, value, token_bytes) for t, value in entry.top],
            }
            for token_id, entry in zip(token_ids, entries, strict=True)
        ]

    return rows


def _chat_token(token_id: int, logprob: float, token_bytes: TokenBytes) -> Json:
    data = token_bytes[token_id]
    return {
        "token": data.decode(errors="replace"),
        "logprob": max(logprob, LOWEST_LOGPROB),
        "bytes": list(data),
    }


# ---- plain completions -------------------------------------------------------------------


def text_logprobs(piece: Piece, token_bytes: TokenBytes, offset: int) -> Json:
    """`offset` is that of the first token in the text of its choice, in characters."""
    columns = _text_columns(token_bytes, offset)
    return {name: rows(piece.token_ids, piece.logprobs) for name, rows in columns.items()}


def text_logprob_parts(whole: HeldAnswer, token_bytes: TokenBytes) -> Iterator[bytes]:
    opening = b"{"
    for name, rows in _text_columns(token_bytes, 0).items():
        yield opening + orjson.dumps(name) + b":["
        yield from _parts(whole, rows)
        opening = b"],"
    yield b"]}"


def _text_columns(token_bytes: TokenBytes, offset: int) -> dict[str, Rows]:
    """Each is to be asked once for every token, in order."""

    def tokens(token_ids: Sequence[int], _: Sequence[TokenLogprobs]) -> list[str]:
        return [token_bytes[token_id].decode(errors="replace") for token_id in token_ids]

    def chosen(_: Sequence[int], entries: Sequence[TokenLogprobs]) -> list[float]:
        return [max(entry.logprob, LOWEST_LOGPROB) for entry in entries]

    def tops(token_ids: Sequence[int], entries: Sequence[TokenLogprobs]) -> list[dict[str, float]]:
        pairs = zip(tokens(token_ids, entries), entries, strict=True)
        return [_top_of(token, entry, token_bytes) for token, entry in pairs]

    def offsets(token_ids: Sequence[int], entries: Sequence[TokenLogprobs]) -> list[int]:
        nonlocal offset
        found = []
        for token in tokens(token_ids, entries):
            found.append(offset)
            offset += len(token)
        return found

    return {
        "tokens": tokens,
        "token_logprobs": chosen,
        "top_logprobs": tops,
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


# ---- in parts ----------------------------------------------------------------------------


def _parts(whole: HeldAnswer, rows: Rows) -> Iterator[bytes]:
    """The rows of a few tokens at a time, without the brackets around all of them."""
    for start in range(0, len(whole.token_ids), TOKENS_OF_A_PART):
        end = start + TOKENS_OF_A_PART
        part = orjson.dumps(rows(whole.token_ids[start:end], whole.logprobs(start, end)))
        yield (b"," if start else b"") + part[1:-1]
