"""Errors as clients of Anthropic's API know them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cluster.errors import ContextLengthExceeded

if TYPE_CHECKING:
    from starlette.types import Scope

    from cluster.errors import ServingError

PREFIX = "/v1/messages"
MODELS = "/v1/models"  # which both APIs have
HEADER = b"anthropic-version"  # by which its clients can be told there
UNAVAILABLE = 503
OVERLOADED = 529  # what these clients take for "try again soon", where others are told 503
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
    504: "timeout_error",
}


def asks_anthropic(scope: Scope) -> bool:
    path: str = scope["path"]
    if path.startswith(MODELS):
        return any(name == HEADER for name, _ in scope["headers"])
    return path.startswith(PREFIX)


def message_id(scope: Scope, request_id: str) -> str | None:
    """The id that such an error names; None where another API is asked."""
    return request_id if asks_anthropic(scope) else None


def overflow(num_prompt: int, num_wanted: int, most: int) -> str:
    """Claude Code reads these: on the one it asks for less, on the other it shortens the prompt."""
    if num_prompt >= most:
        return f"prompt is too long: {num_prompt} tokens > {most - 1} maximum"
    return (
        f"input length and `max_tokens` exceed context limit: {num_prompt} + {num_wanted} > "
        f"{most}, decrease input length or `max_tokens` and try again"
    )


def message_status(error: ServingError) -> int:
    return OVERLOADED if error.http_status == UNAVAILABLE else error.http_status


def message_error(error: ServingError, request_id: str) -> dict[str, Any]:
    kind = _TYPES.get(error.http_status)
    if kind is None:
        kind = "invalid_request_error" if error.http_status < 500 else "api_error"
    return {
        "type": "error",
        "error": {"type": kind, "message": _message(error)},
        "request_id": request_id,
    }


def _message(error: ServingError) -> str:
    """No other place is for the field that is wrong. An overflow says what clients look for."""
    names_it = error.param is None or error.param in error.message
    if names_it or isinstance(error, ContextLengthExceeded):
        return error.message
    return f"{error.param}: {error.message}"
