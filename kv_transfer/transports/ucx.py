"""UCX as a transport: NVLink and same-node CUDA, RDMA, shared memory and TCP behind one name.

Life of the worker
    1. One UCX context and worker per transport, driven by the event loop: UCX's file
       descriptor wakes `_Progress`, which progresses the worker, completes futures and arms
       the descriptor again. Nothing polls, and no task is made per message.
    2. `connect` opens an endpoint and names the session in the first message, on the
       endpoint's own stream; `listen` reads it and hands the endpoint to `accept`.
    3. Endpoints have error handling, so the death of a peer ends every operation and calls
       `on_close`. `close` forces: UCX cancels what is posted, then cuts.
    4. Endpoints close before the listener, the listener before the worker.

This uses the layer of ucxx below its asyncio front: that one waits by polling, and can neither
report nor bound a close. UCX binds its listener to every interface; a connection that does not
know a session id, which only the control plane gives out, is closed unread.
"""

from __future__ import annotations

import asyncio
import logging
import os
import struct
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.errors import ConfigError
from kv_transfer.failures import FailureReason, failure
from kv_transfer.transports.ucx_lanes import carrier, lanes_of, resources_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from kv_transfer.transports.base import Accept

logger = logging.getLogger(__name__)

_HELLO = struct.Struct("<8sQ")
_HELLO_MAGIC = b"BATONKV1"
_SHARED_MEMORY_NAMES = {"sm", "shm", "mm", "sysv", "posix"}
_POLL_SECONDS = 0.25  # a guard against a lost wake-up, not the way progress is made
_CLOSE_SECONDS = 2.0
# What takes longer on a device waits for its peer, not for a copy: the descriptor will tell.
_SPIN_SECONDS = 0.02
_MAX_DEVICE_ARRAYS = 256


def _load() -> tuple[Any, Any]:
    """ucxx's modules; `ConfigError` where it is not installed."""
    try:
        from ucxx._lib import arr, libucxx
    except ImportError as error:
        raise ConfigError("ucxx is not installed: pip install ucxx-cu13.") from error
    # ucxx sets this on import for old versions of UCX; here it only makes UCX look up the kind
    # of each buffer again.
    os.environ.pop("UCX_MEMTYPE_CACHE", None)
    return libucxx, arr


def _options(ucx_tls: str | None, *, moves_device_memory: bool) -> dict[str, str]:
    """UCX uses shared memory between processes that survive each other's death only if told. In
    host memory it is told to put straight into the receiver's buffer: over TCP it would otherwise
    copy every byte twice more."""
    options: dict[str, str] = {}
    if not moves_device_memory and "UCX_RNDV_SCHEME" not in os.environ:
        options["RNDV_SCHEME"] = "put_zcopy"
    if ucx_tls is None:
        return options
    options["TLS"] = ucx_tls
    if _SHARED_MEMORY_NAMES & set(ucx_tls.split(",")):
        options |= {"SYSV_ERROR_HANDLING": "y", "POSIX_ERROR_HANDLING": "y"}
    return options


def find_transports() -> tuple[str, ...]:
    """UCX's names of the transports on this machine. Raises `ConfigError` without UCX."""
    libucx, _ = _load()
    context = libucx.UCXContext({}, feature_flags=(libucx.Feature.TAG,))
    return resources_of(context.info)


class _Progress:
    """Drives one worker from the event loop and completes the futures of its requests."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._pending: list[tuple[Any, asyncio.Future[None], Any]] = []
        self._is_scheduled = False
        self._is_stopped = False
        self._spin_until = 0.0  # on the loop's clock
        self._num_on_device = 0
        worker.init_blocking_progress_mode()
        self._loop.add_reader(worker.epoll_file_descriptor, self._run)
        self._timer = self._loop.call_later(_POLL_SECONDS, self._poll)

    def watch(self, request: Any, keep: Any, *, on_device: bool) -> asyncio.Future[None]:
        """A future for `request`; `keep` (its buffer) lives as long as the request does."""
        future: asyncio.Future[None] = self._loop.create_future()
        self._pending.append((request, future, keep))
        if on_device:
            self._num_on_device += 1
            self._spin_until = self._loop.time() + _SPIN_SECONDS
            future.add_done_callback(self._device_operation_ended)
        self.kick()
        return future

    def _device_operation_ended(self, _: asyncio.Future[None]) -> None:
        self._num_on_device -= 1
        self._spin_until = self._loop.time() + _SPIN_SECONDS

    def kick(self) -> None:
        """Progress soon: something was posted, so an armed descriptor may not tell."""
        if not self._is_scheduled and not self._is_stopped:
            self._is_scheduled = True
            self._loop.call_soon(self._run)

    def stop(self) -> None:
        self._is_stopped = True
        self._timer.cancel()
        self._loop.remove_reader(self._worker.epoll_file_descriptor)
        self._pending.clear()

    def _run(self) -> None:
        self._is_scheduled = False
        if self._is_stopped:
            return
        self._worker.progress()
        self._complete()
        if self._is_spinning() or not self._worker.arm():
            self.kick()

    def _is_spinning(self) -> bool:
        return self._num_on_device > 0 and self._loop.time() < self._spin_until

    def _poll(self) -> None:
        self._timer = self._loop.call_later(_POLL_SECONDS, self._poll)
        self.kick()

    def _complete(self) -> None:
        waiting = []
        for entry in self._pending:
            if entry[0].completed:
                _resolve(entry[0], entry[1])
            else:
                waiting.append(entry)
        self._pending = waiting


def _resolve(request: Any, future: asyncio.Future[None]) -> None:
    if future.done():
        return
    try:
        request.check_error()
    except Exception as error:
        logger.debug("a UCX request ended: %s", error)
        future.set_exception(failure(FailureReason.LINK_LOST))
    else:
        future.set_result(None)


class UcxEndpoint:
    """One UCX endpoint, with the operations posted on it."""

    def __init__(self, transport: UcxTransport, endpoint: Any) -> None:
        self._transport = transport
        self._endpoint = endpoint
        self._posted: set[asyncio.Future[None]] = set()
        self._callbacks: list[Callable[[], None]] = []
        self._is_closed = False
        self._loop = asyncio.get_running_loop()
        endpoint.set_close_callback(self._on_ucx_close)

    @property
    def transport_name(self) -> str:
        return carrier(self.lanes, on_device=self._transport.moves_device_memory)

    @property
    def lanes(self) -> tuple[str, ...]:
        """The UCX transports connected under this endpoint, e.g. ("tcp", "cuda_ipc")."""
        return () if self._is_closed else lanes_of(self._endpoint.handle)

    def send(self, buffer: torch.Tensor, tag: int) -> asyncio.Future[None]:
        array = self._transport.array(buffer)
        return self._post(
            lambda: self._endpoint.tag_send(array, self._transport.tag(tag)),
            array,
            on_device=buffer.is_cuda,
        )

    def recv(self, buffer: torch.Tensor, tag: int) -> asyncio.Future[None]:
        array = self._transport.array(buffer)
        return self._post(
            lambda: self._endpoint.tag_recv(array, self._transport.tag(tag)),
            array,
            on_device=buffer.is_cuda,
        )

    def send_hello(self, session_id: int) -> asyncio.Future[None]:
        data = np.frombuffer(_HELLO.pack(_HELLO_MAGIC, session_id), dtype=np.uint8)
        array = self._transport.array_of(data)
        return self._post(lambda: self._endpoint.stream_send(array), array)

    async def recv_hello(self) -> int | None:
        """The session id the peer names; None when it speaks something else."""
        data = np.zeros(_HELLO.size, dtype=np.uint8)
        array = self._transport.array_of(data)
        await self._post(lambda: self._endpoint.stream_recv(array), array)
        magic, session_id = _HELLO.unpack(data.tobytes())
        return int(session_id) if magic == _HELLO_MAGIC else None

    def on_close(self, callback: Callable[[], None]) -> None:
        if self._is_closed:
            callback()
        else:
            self._callbacks.append(callback)

    async def close(self) -> bool:
        self._mark_closed()
        # Cancels what is posted, then cuts; it progresses the worker until the cut is done,
        # which with a forced close does not wait for the peer.
        self._endpoint.close_blocking()
        self._transport.progress.kick()
        if self._posted:
            await asyncio.wait(self._posted, timeout=_CLOSE_SECONDS)
        self._transport.forget(self)
        return not self._posted

    def _post(
        self, post: Callable[[], Any], array: Any, *, on_device: bool = False
    ) -> asyncio.Future[None]:
        try:
            if self._is_closed:
                raise failure(FailureReason.LINK_LOST)
            request = post()
        except Exception as error:
            logger.debug("UCX refused an operation: %s", error)
            refused: asyncio.Future[None] = self._loop.create_future()
            refused.set_exception(failure(FailureReason.LINK_LOST))
            return refused
        future = self._transport.progress.watch(request, array, on_device=on_device)
        self._posted.add(future)
        future.add_done_callback(self._posted.discard)
        return future

    def _on_ucx_close(self) -> None:
        """Called by UCX inside progress, where no UCX call is allowed."""
        self._loop.call_soon(self._mark_closed)

    def _mark_closed(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()


class UcxTransport:
    """One UCX worker on the running event loop."""

    def __init__(
        self, *, ucx_tls: str | None, moves_device_memory: bool, connect_seconds: float
    ) -> None:
        self._ucx, self._arr = _load()
        options = _options(ucx_tls, moves_device_memory=moves_device_memory)
        feature = self._ucx.Feature
        self._context = self._ucx.UCXContext(
            options, feature_flags=(feature.TAG, feature.STREAM, feature.WAKEUP)
        )
        self._worker = self._ucx.UCXWorker(self._context)
        self.progress = _Progress(self._worker)
        self.moves_device_memory = moves_device_memory
        self._connect_seconds = connect_seconds
        self._listener: Any = None
        self._device_arrays: dict[tuple[int, int], Any] = {}
        self._endpoints: set[UcxEndpoint] = set()
        self._greeting: set[asyncio.Task[None]] = set()

    @property
    def name(self) -> str:
        return "ucx"

    @property
    def available(self) -> tuple[str, ...]:
        """UCX's names of the transports that it may use on this machine."""
        return resources_of(self._context.info)

    async def listen(self, host: str, port: int, accept: Accept) -> int:
        """Raises `ConfigError` when the port is taken."""
        try:
            self._listener = self._ucx.UCXListener.create(
                self._worker, port, self._on_connection, cb_args=(accept,), deliver_endpoint=True
            )
        except self._ucx.UCXError as error:
            raise ConfigError(
                f"Port {port} cannot be used for KV transfer.", param="kv_port"
            ) from error
        return int(self._listener.port)

    async def connect(self, host: str, port: int, session_id: int) -> UcxEndpoint:
        try:
            raw = self._ucx.UCXEndpoint.create(self._worker, host, port, True)
        except (self._ucx.UCXError, RuntimeError, OSError) as error:
            raise failure(FailureReason.LINK_LOST) from error
        endpoint = UcxEndpoint(self, raw)
        self._endpoints.add(endpoint)
        try:
            await asyncio.wait_for(endpoint.send_hello(session_id), self._connect_seconds)
        except (TimeoutError, asyncio.CancelledError):
            await endpoint.close()
            raise failure(FailureReason.LINK_LOST) from None
        return endpoint

    async def close(self) -> None:
        for greeting in self._greeting:
            greeting.cancel()
        for endpoint in list(self._endpoints):
            await endpoint.close()
        self._listener = None
        self.progress.stop()

    def forget(self, endpoint: UcxEndpoint) -> None:
        self._endpoints.discard(endpoint)

    def tag(self, tag: int) -> Any:
        return self._ucx.UCXXTag(tag)

    def array(self, buffer: torch.Tensor) -> Any:
        """ucxx's view of a tensor: by the buffer protocol, or by the CUDA array interface, which
        takes its time. Device memory that is sent or received is that of slots, again and again."""
        if not buffer.is_cuda:
            return self._arr.Array(buffer.numpy())
        key = (buffer.data_ptr(), buffer.numel())
        array = self._device_arrays.get(key)
        if array is None:
            if len(self._device_arrays) >= _MAX_DEVICE_ARRAYS:
                self._device_arrays.clear()
            array = self._device_arrays[key] = self._arr.Array(buffer)
        return array

    def array_of(self, data: np.ndarray[Any, np.dtype[np.uint8]]) -> Any:
        return self._arr.Array(data)

    def _on_connection(self, raw: Any, accept: Accept) -> None:
        """Called by UCX inside progress."""
        endpoint = UcxEndpoint(self, raw)
        self._endpoints.add(endpoint)
        greeting = asyncio.get_running_loop().create_task(self._greet(endpoint, accept))
        self._greeting.add(greeting)
        greeting.add_done_callback(self._greeting.discard)

    async def _greet(self, endpoint: UcxEndpoint, accept: Accept) -> None:
        try:
            session_id = await asyncio.wait_for(endpoint.recv_hello(), self._connect_seconds)
        except Exception as error:
            logger.warning("a KV connection ended before it named its session: %s", error)
            session_id = None
        if session_id is None:
            await endpoint.close()
        else:
            accept(session_id, endpoint)
