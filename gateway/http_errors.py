"""Errors as HTTP answers, in the shape of the API that was asked; the only place that does it.

Whatever is not a `ServingError` is a bug of ours: the client learns that and the request's id,
nothing of the exception.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import orjson

from cluster.errors import InternalError, ServingError, TransferError
from gateway.dialects.messages_errors import message_error, message_status

if TYPE_CHECKING:
    from starlette.types import Send

logger = logging.getLogger(__name__)
Headers = list[tuple[bytes, bytes]]
JSON = b"application/json"
MAX_PATH_CHARS = 200


def as_serving_error(error: BaseException) -> ServingError:
    """The error itself when it is typed; else it is logged and hidden."""
    if isinstance(error, ServingError):
        return error
    logger.error("unexpected error", exc_info=error)
    return unexplained()


def unexplained() -> InternalError:
    return InternalError("Something went wrong here; the request's id helps to find out what.")


def log_refusal(error: ServingError, route: str, status: int) -> None:
    """For what is refused before it is a `Generation`, which logs its own end. `route`: or the
    path, which may be of any length. The message stays out: it may quote the body."""
    facts = {"route": route[:MAX_PATH_CHARS], "status": status, "error": error.code}
    facts |= {"reason": error.reason, "param": error.param}
    logger.info("request refused", extra=facts)


def error_body(error: ServingError) -> dict[str, Any]:
    body = {
        "message": error.message,
        "type": error.openai_type,
        "param": error.param,
        "code": error.code,
    }
    if isinstance(error, TransferError):
        body["cause"] = error.cause
    return {"error": body}


def status_of(error: ServingError, message_id: str | None) -> int:
    """That the client is told, so that book, metrics and log say the same. `message_id`: the
    request's, when Anthropic's API was asked."""
    return error.http_status if message_id is None else message_status(error)


def error_answer(error: ServingError, message_id: str | None = None) -> tuple[int, bytes]:
    """Status and body, as `status_of` has it."""
    body = error_body(error) if message_id is None else message_error(error, message_id)
    return status_of(error, message_id), orjson.dumps(body)


def error_headers(error: ServingError) -> Headers:
    """What tells a client whether and when to ask again."""
    headers: Headers = []
    if error.retry_after_seconds is not None:
        seconds = error.retry_after_seconds
        headers.append((b"retry-after", str(math.ceil(seconds)).encode()))
        headers.append((b"retry-after-ms", str(math.ceil(seconds * 1000)).encode()))
    if error.http_status >= 408:
        headers.append((b"x-should-retry", b"true" if error.retryable else b"false"))
    if error.http_status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return headers


async def send_error(send: Send, error: ServingError, message_id: str | None = None) -> None:
    status, body = error_answer(error, message_id)
    await send_json(send, status, body, error_headers(error))


async def send_json(send: Send, status: int, body: bytes, headers: Headers | None = None) -> None:
    """A whole JSON answer on a raw ASGI `send`."""
    start = [(b"content-type", JSON), (b"content-length", str(len(body)).encode())]
    await send(
        {"type": "http.response.start", "status": status, "headers": start + (headers or [])}
    )
    await send({"type": "http.response.body", "body": body})
