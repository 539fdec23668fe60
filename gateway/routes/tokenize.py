"""`POST /tokenize` and `/detokenize`: what the model would see, without running it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import orjson

from cluster.errors import InvalidRequest
from gateway.body import read_object
from gateway.dialects.messages_body import parse_count_tokens
from gateway.http_errors import send_json
from gateway.schemas import parse_detokenize, parse_tokenize

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from gateway.gateway import Gateway


class TokenizeEndpoint:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = await self._answer(await _read(self._gateway, scope, receive))
        await send_json(send, 200, orjson.dumps(answer))

    async def _answer(self, fields: dict[str, Any]) -> dict[str, Any]:
        gateway = self._gateway
        body = parse_tokenize(fields)
        gateway.model_for(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("Either prompt or messages must be given.", param="prompt")
        if body.prompt is None:
            tokens = await gateway.validator.chat_token_ids(body)
        else:
            adds = body.add_special_tokens is not False
            tokens = await gateway.tokenizer.encode(body.prompt, add_special_tokens=adds)
        pieces: list[str | None] | None = None
        if body.return_token_strs:
            pieces = await gateway.tokenizer.run(
                lambda: [gateway.tokenizer.piece(token) for token in tokens], len(tokens)
            )
        return {
            "count": len(tokens),
            "max_model_len": gateway.nodes.max_model_len(),
            "tokens": tokens,
            "token_strs": pieces,
        }


class CountTokensEndpoint:
    """Anthropic's `POST /v1/messages/count_tokens`."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = parse_count_tokens(await _read(self._gateway, scope, receive))
        self._gateway.model_for(body.model)
        tokens = await self._gateway.validator.chat_token_ids(body)
        await send_json(send, 200, orjson.dumps({"input_tokens": len(tokens)}))


class DetokenizeEndpoint:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gateway = self._gateway
        body = parse_detokenize(await _read(gateway, scope, receive))
        gateway.model_for(body.model)
        gateway.validator.check_token_ids(body.tokens, "tokens")
        decode = partial(gateway.tokenizer.decode, body.tokens, skip_special_tokens=False)
        text = await gateway.tokenizer.run(decode, len(body.tokens))
        await send_json(send, 200, orjson.dumps({"prompt": text}))


async def _read(gateway: Gateway, scope: Scope, receive: Receive) -> dict[str, Any]:
    return await read_object(
        scope,
        receive,
        max_bytes=gateway.config.max_body_bytes,
        timeout_seconds=gateway.config.body_timeout,
    )
