"""Every error that can end a request or stop a start, as one tree.

    ServingError
    |- InvalidRequest            400 invalid_value
    |  |- ContextLengthExceeded  400 context_length_exceeded
    |  |- Unsupported            400 unsupported
    |  |- ModelNotFound          404 model_not_found
    |  |- RouteNotFound          404 not_found
    |  |- MethodNotAllowed       405 method_not_allowed
    |  |- RequestTimeout         408 request_timeout
    |  |- RequestTooLarge        413 request_too_large
    |  `- UnsupportedMediaType   415 unsupported_media_type
    |- AuthenticationFailed      401 invalid_api_key
    |- PermissionDenied          403 permission_denied
    |- Overloaded                503 overloaded
    |  `- OutOfMemory            503 overloaded
    |- NodeUnavailable           503 no_capacity
    |  `- NodeLost               503 node_lost
    |- TransferError             503 kv_load_failed
    |  |- HandshakeMismatch      503 kv_load_failed
    |  |- TransferFailed         503 kv_load_failed
    |  `- LeaseExpired           503 kv_load_failed
    |- DeadlineExceeded          504 deadline_exceeded
    |- Cancelled                 499 cancelled
    |- ConfigError               a configuration that cannot work, before serving; exit 3
    |  `- UsageError             a mistake on the command line; exit 2
    `- InternalError             500 internal

Each class carries what every edge needs, so each edge translates once: `code` (the string
clients match and the metric label), `http_status`, `grpc_code` (name in `grpc.StatusCode`),
`openai_type` and `retryable`. The message is written for the person who sees it and never
holds addresses, paths of the host or a traceback.
"""

from __future__ import annotations

import errno
from typing import ClassVar


class ServingError(Exception):
    """Base of all typed errors. `retry_after_seconds` is sent as `Retry-After` when set."""

    code: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    grpc_code: ClassVar[str] = "INTERNAL"
    openai_type: ClassVar[str] = "server_error"
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        reason: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.reason = reason
        self.retry_after_seconds = retry_after_seconds


class InvalidRequest(ServingError):
    code = "invalid_value"
    http_status = 400
    grpc_code = "INVALID_ARGUMENT"
    openai_type = "invalid_request_error"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class Unsupported(InvalidRequest):
    code = "unsupported"


class ModelNotFound(InvalidRequest):
    code = "model_not_found"
    http_status = 404
    grpc_code = "NOT_FOUND"
    openai_type = "not_found_error"


class RouteNotFound(InvalidRequest):
    code = "not_found"
    http_status = 404
    grpc_code = "NOT_FOUND"
    openai_type = "not_found_error"


class MethodNotAllowed(InvalidRequest):
    code = "method_not_allowed"
    http_status = 405


class RequestTimeout(InvalidRequest):
    """The client was too slow to send its request."""

    code = "request_timeout"
    http_status = 408
    retryable = True


class RequestTooLarge(InvalidRequest):
    code = "request_too_large"
    http_status = 413


class UnsupportedMediaType(InvalidRequest):
    code = "unsupported_media_type"
    http_status = 415


class AuthenticationFailed(ServingError):
    code = "invalid_api_key"
    http_status = 401
    grpc_code = "UNAUTHENTICATED"
    openai_type = "authentication_error"


class PermissionDenied(ServingError):
    code = "permission_denied"
    http_status = 403
    grpc_code = "PERMISSION_DENIED"
    openai_type = "permission_error"


class Overloaded(ServingError):
    code = "overloaded"
    http_status = 503
    grpc_code = "RESOURCE_EXHAUSTED"
    retryable = True


class OutOfMemory(Overloaded):
    """A step found no memory on its device. Only its sequences end."""


class NodeUnavailable(ServingError):
    code = "no_capacity"
    http_status = 503
    grpc_code = "UNAVAILABLE"
    retryable = True


class NodeLost(NodeUnavailable):
    code = "node_lost"


# What a client is told of why KV was not loaded, by our own reason. For the load, the link to a
# prefill node and that node are the same. Whatever is not named here is `unknown`.
_CAUSES = {
    "prefill_lost": "prefill_lost",
    "prefill_replaced": "prefill_lost",
    "link_lost": "prefill_lost",
    "transfer_timeout": "transfer_timeout",
    "lease_expired": "lease_expired",
    "digest_mismatch": "digest_mismatch",
    "layout_mismatch": "layout_mismatch",
    "transport_refused": "layout_mismatch",
}
UNKNOWN_CAUSE = "unknown"


class TransferError(ServingError):
    code = "kv_load_failed"
    http_status = 503
    grpc_code = "UNAVAILABLE"
    retryable = True

    @property
    def cause(self) -> str:
        """One of a few words that never change, for clients; `reason` is for us."""
        return _CAUSES.get(self.reason or "", UNKNOWN_CAUSE)


class HandshakeMismatch(TransferError):
    """The two nodes differ in model, KV layout, dtype or protocol version."""


class TransferFailed(TransferError):
    """KV did not arrive, or arrived wrong. `reason` names the cause."""


class LeaseExpired(TransferError):
    """The blocks were released because their lease was not renewed."""


class DeadlineExceeded(ServingError):
    code = "deadline_exceeded"
    http_status = 504
    grpc_code = "DEADLINE_EXCEEDED"
    retryable = True


class Cancelled(ServingError):
    code = "cancelled"
    http_status = 499
    grpc_code = "CANCELLED"


class ConfigError(ServingError):
    """Raised before serving; the command line prints its message and exits with `exit_code`."""

    code = "config"
    grpc_code = "FAILED_PRECONDITION"
    exit_code: ClassVar[int] = 3


class UsageError(ConfigError):
    """A flag or argument that cannot be understood."""

    exit_code = 2


def cannot_listen(where: str, cause: OSError | None, *, param: str) -> ConfigError:
    """An address that cannot be had. `param` is the option that names the port; `cause` None: it
    is not known, and that the port is taken is most likely."""
    why = "is it in use?" if cause is None else f"{cause.strerror}."
    flag = f"--{param.replace('_', '-')}"
    advice = f" {flag} takes another port, 0 any free one."
    is_taken = cause is None or cause.errno == errno.EADDRINUSE
    return ConfigError(f"cannot listen on {where}: {why}{advice if is_taken else ''}", param=param)


class InternalError(ServingError):
    code = "internal"


def device_lost() -> InternalError:
    """It raises where it is waited for: nothing runs there any more, and this process must end."""
    return InternalError("The device of this node is lost.")


def error_classes() -> list[type[ServingError]]:
    """Every class of the tree, parents before children."""
    found: list[type[ServingError]] = []
    pending: list[type[ServingError]] = [ServingError]
    while pending:
        cls = pending.pop(0)
        found.append(cls)
        pending.extend(cls.__subclasses__())
    return found
