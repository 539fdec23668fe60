"""The routes that generate, in whichever API they are asked, as raw ASGI.

1. The body is read within its limits and becomes a `Request` that cannot be wrong.
2. The request is taken in, or refused with a typed error before any header is sent.
3. Its answer is written, streamed or whole, while somebody watches for the client's leaving.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cluster.errors import InvalidRequest
from cluster.request import KVLoadFailurePolicy
from gateway.body import read_object
from gateway.dialects.messages_body import parse_messages
from gateway.dialects.messages_errors import message_id
from gateway.dialects.responses_body import parse_responses, repeated
from gateway.edge import KEY_HOLDER, REQUEST_ID
from gateway.http_errors import as_serving_error, log_refusal, send_error, status_of
from gateway.http_server import CUT
from gateway.lost_clients import ClientStalled
from gateway.request import Route
from gateway.schemas import parse_chat, parse_completion
from gateway.streaming import StreamWriter
from gateway.validation import Asked
from gateway.whole_answers import write_whole

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from cluster.errors import ServingError
    from gateway.gateway import Gateway
    from gateway.generation import Generation
    from gateway.request import Request

logger = logging.getLogger(__name__)
POLICY_HEADER = b"x-baton-kv-load-failure-policy"
DEADLINE_HEADER = b"x-request-deadline-ms"
MAX_DEADLINE_MS = 10**9
_CHATS = {
    Route.CHAT: parse_chat,
    Route.RESPONSES: parse_responses,
    Route.MESSAGES: parse_messages,
}


class GenerateEndpoint:
    """One route of the public API."""

    def __init__(self, gateway: Gateway, route: Route) -> None:
        self._gateway = gateway
        self._route = route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gateway = self._gateway
        arrived_at = gateway.clock()
        request: Request | None = None
        try:
            request = await self._read_request(scope, receive)
            generation = await gateway.begin(request, arrived_at=arrived_at)
        except Exception as error:  # the top of a request: whatever it is becomes its answer
            known = as_serving_error(error)
            named = message_id(scope, scope[REQUEST_ID])
            status = status_of(known, named)
            if request is None:
                self._note_refusal(scope, status, known, arrived_at)
            gateway.measures.request_ended(self._route.value, status, known)
            await send_error(send, known, named)
            return
        try:
            await self._write(generation, receive, send)
        except ClientStalled:
            logger.info("a client stopped reading its answer: it is cut off")
            scope[CUT]()
            await asyncio.sleep(0)  # now the server knows
        finally:
            route, status = self._route.value, generation.status
            gateway.measures.request_ended(route, status, generation.error)

    def _note_refusal(
        self, scope: Scope, status: int, error: ServingError, arrived_at: float
    ) -> None:
        gateway, route = self._gateway, self._route.value
        seconds = gateway.clock() - arrived_at
        gateway.book.refused(scope[REQUEST_ID], route, status, error, seconds)
        log_refusal(error, route, status)

    async def _read_request(self, scope: Scope, receive: Receive) -> Request:
        gateway = self._gateway
        gateway.check_room()
        fields = await read_object(
            scope,
            receive,
            max_bytes=gateway.config.max_body_bytes,
            timeout_seconds=gateway.config.body_timeout,
        )
        deadline = deadline_of(scope)
        if self._route in _CHATS:
            chat = _CHATS[self._route](fields)
            asked = self._asked(scope, chat.model, deadline)
            if self._route is Route.RESPONSES:
                asked = replace(asked, repeated=repeated(fields))
            return await gateway.validator.chat(chat, asked, self._route)
        plain = parse_completion(fields)
        asked = self._asked(scope, plain.model, deadline)
        return await gateway.validator.completion(plain, asked)

    def _asked(self, scope: Scope, model: str | None, deadline: float | None) -> Asked:
        return Asked(
            request_id=scope[REQUEST_ID],
            created=int(time.time()),
            model=self._gateway.model_for(model),
            max_model_len=self._gateway.max_model_len(),
            deadline_seconds=deadline,
            kv_load_failure_policy=self._policy_of(scope),
            cache_owner=scope[KEY_HOLDER] if self._gateway.config.separate_keys else b"",
        )

    def _policy_of(self, scope: Scope) -> KVLoadFailurePolicy | None:
        """What the client chose, where the operator lets it."""
        if not self._gateway.config.allow_policy_header:
            return None
        return policy_of(scope)

    async def _write(self, generation: Generation, receive: Receive, send: Send) -> None:
        gateway = self._gateway
        token_bytes = gateway.tokenizer.token_bytes
        if not generation.request.stream.is_stream:
            await write_whole(
                generation,
                token_bytes,
                receive,
                send,
                write_timeout=gateway.times.write_timeout,
                clock=gateway.clock,
            )
            return
        writer = StreamWriter(
            generation, token_bytes, send, times=gateway.times, clock=gateway.clock
        )
        await writer.run(receive)


def deadline_of(scope: Scope) -> float | None:
    """Seconds that the client gives this request; None without the header."""
    value: Any = dict(scope["headers"]).get(DEADLINE_HEADER)
    if value is None:
        return None
    if not value.isdigit() or len(value) > 12 or not 0 < int(value) <= MAX_DEADLINE_MS:
        raise InvalidRequest(
            "X-Request-Deadline-Ms must be a positive number of milliseconds.",
            param="X-Request-Deadline-Ms",
        )
    return int(value) / 1000


def policy_of(scope: Scope) -> KVLoadFailurePolicy | None:
    """What this request wants done when KV cannot be loaded; None without the header."""
    value: Any = dict(scope["headers"]).get(POLICY_HEADER)
    if value is None:
        return None
    try:
        return KVLoadFailurePolicy(value.decode("latin-1"))
    except ValueError as error:
        allowed = " or ".join(KVLoadFailurePolicy)
        raise InvalidRequest(
            f"x-baton-kv-load-failure-policy must be {allowed}.",
            param="x-baton-kv-load-failure-policy",
        ) from error
