"""What all gRPC ends share: options, servers, channels, and errors across the border.

An error crosses once in each direction. A handler raises a `ServingError`; the interceptor turns
it into a status with the whole error in trailing metadata; the caller's `error_from_rpc` gives
the same class back. Anything else a handler raises becomes an `InternalError` without details.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from cluster.delta_codec import decode_error, encode_error
from cluster.errors import (
    Cancelled,
    DeadlineExceeded,
    InternalError,
    NodeLost,
    NodeUnavailable,
    Overloaded,
    ServingError,
    cannot_listen,
)
from cluster.message_size import BASE_MESSAGE_BYTES
from cluster.proto import node_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

logger = logging.getLogger(__name__)

KEEPALIVE_SECONDS = 10.0
KEEPALIVE_TIMEOUT_SECONDS = 3.0
MAX_CONCURRENT_STREAMS = 256

_ERROR_KEY = "baton-error-bin"
_RECONNECT_MS = 200
# A peer whose machine is busy takes that long to greet; one that is gone refuses at once.
_CONNECT_MS = 1000
_MAX_RECONNECT_MS = 2000

Options = list[tuple[str, int]]


def _common_options(max_message_bytes: int) -> Options:
    return [
        ("grpc.max_send_message_length", -1),  # the receiver's is what counts (`message_size.py`)
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", int(KEEPALIVE_SECONDS * 1000)),
        ("grpc.keepalive_timeout_ms", int(KEEPALIVE_TIMEOUT_SECONDS * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def channel_options(max_message_bytes: int = BASE_MESSAGE_BYTES) -> Options:
    """A silent peer is found out within keepalive time and timeout; reconnects are quick."""
    return [
        *_common_options(max_message_bytes),
        ("grpc.enable_retries", 0),  # the gateway alone decides about retries
        ("grpc.enable_http_proxy", 0),
        ("grpc.initial_reconnect_backoff_ms", _RECONNECT_MS),
        ("grpc.min_reconnect_backoff_ms", _CONNECT_MS),  # what one attempt to connect may take
        ("grpc.max_reconnect_backoff_ms", _MAX_RECONNECT_MS),
        # Each node or peer has a connection of its own: one's stall is not another's.
        ("grpc.use_local_subchannel_pool", 1),
    ]


def server_options(max_message_bytes: int = BASE_MESSAGE_BYTES) -> Options:
    """Accepts the channels' pings and those of a pulse (`pulse.py`); refuses a port that another
    process has."""
    return [
        *_common_options(max_message_bytes),
        # However close they come: those that were held up on their way come together.
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.max_concurrent_streams", MAX_CONCURRENT_STREAMS),
        ("grpc.so_reuseport", 0),
    ]


def open_channel(
    address: str,
    *,
    credentials: grpc.ChannelCredentials | None = None,
    max_message_bytes: int = BASE_MESSAGE_BYTES,
) -> grpc.aio.Channel:
    """A channel to `host:port`; it connects with the first call. Plain text unless told.
    `max_message_bytes`: of what comes."""
    options = channel_options(max_message_bytes)
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, credentials, options=options)


def create_server(max_message_bytes: int = BASE_MESSAGE_BYTES) -> grpc.aio.Server:
    """A server that translates errors. Add services, `bind`, then start it."""
    options = server_options(max_message_bytes)
    return grpc.aio.server(interceptors=[ErrorInterceptor()], options=options)


def bind(
    server: grpc.aio.Server,
    host: str,
    port: int,
    *,
    credentials: grpc.ServerCredentials | None = None,
) -> int:
    """Listen on `host:port`, 0 for a free port; the port in use. `ConfigError` when taken."""
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if credentials is None:
            bound: int = server.add_insecure_port(where)
        else:
            bound = server.add_secure_port(where, credentials)
    except RuntimeError as error:
        raise cannot_listen(where, _why_not(host, port), param="port") from error
    if bound == 0:
        raise cannot_listen(where, _why_not(host, port), param="port")
    return bound


def _why_not(host: str, port: int) -> OSError | None:
    """What the system says to the same address; gRPC does not tell."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(address)
    except OSError as error:
        return error
    return None


# ---- errors ------------------------------------------------------------------------------


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Ends a call whose handler raised with that error's status and details."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(
                _translating_stream(handler.stream_stream),
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                _translating_unary(handler.unary_unary),
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
        return handler  # the control plane has no calls of another shape


def _translating_unary(behavior: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
        async with _translating(context, "The node failed to answer this call."):
            return await behavior(request, context)

    return call


def _translating_stream(
    behavior: Callable[..., AsyncGenerator[Any]],
) -> Callable[..., Awaitable[None]]:
    """Writes what `behavior` yields: whatever interrupts a write is raised here, too."""

    async def call(request: Any, context: grpc.aio.ServicerContext) -> None:
        async with (
            _translating(context, "The node failed to serve this stream."),
            # Closed here and now: the clean-up of a stream must not wait for the collector.
            contextlib.aclosing(behavior(request, context)) as messages,
        ):
            async for message in messages:
                await context.write(message)

    return call


@contextlib.asynccontextmanager
async def _translating(context: grpc.aio.ServicerContext, apology: str) -> AsyncGenerator[None]:
    """The top of a call: whatever its handler raises ends it with a typed error."""
    try:
        yield
    except ServingError as error:
        await abort(context, error)
    except asyncio.CancelledError:
        # By the caller, who has gone, or by this node: then gRPC would tell the caller nothing, who
        # would read a stream for ever that nobody serves.
        await abort(context, NodeUnavailable("The node ended this call.", reason="dropped"))
    except grpc.aio.AbortError:
        raise
    except Exception:
        logger.exception("a call failed: %s", apology)
        await abort(context, InternalError(apology))


async def abort(context: grpc.aio.ServicerContext, error: ServingError) -> None:
    """End the call with `error`; does not return."""
    details = ((_ERROR_KEY, encode_error(error).SerializeToString()),)
    await context.abort(grpc.StatusCode[error.grpc_code], error.message, details)


def error_from_rpc(error: grpc.aio.AioRpcError) -> ServingError:
    """The error the peer raised, or what the status says when the peer said nothing."""
    carried = _carried_error(error.trailing_metadata() or ())
    if carried is not None:
        return carried
    match error.code():
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded("The node did not answer in time.")
        case grpc.StatusCode.CANCELLED:
            return Cancelled("The call was cancelled.")
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return Overloaded("The node refused the call.", reason="resource_exhausted")
        case grpc.StatusCode.UNAVAILABLE:
            return NodeLost("The node cannot be reached.")
        case grpc.StatusCode.UNIMPLEMENTED:
            return NodeUnavailable("The node cannot do this; is it older?", reason="not_offered")
        case _:
            return InternalError("The node failed to answer.", reason=error.code().name.lower())


def is_cancelled() -> bool:
    """True when the running task itself was asked to end: grpc.aio raises `CancelledError` also for
    a call that was cut off with its channel, or cancelled by another task."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _carried_error(metadata: Sequence[tuple[str, str | bytes]]) -> ServingError | None:
    for key, value in metadata:
        if key == _ERROR_KEY and isinstance(value, bytes):
            try:
                return decode_error(pb.Error.FromString(value))
            except DecodeError:
                return None
    return None
