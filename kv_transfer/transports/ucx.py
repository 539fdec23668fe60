"""UCX as a transport: NVLink and same-node CUDA, RDMA, shared memory and TCP behind one name.

Life of the worker
    1. One UCX context and worker per transport, driven by the event loop: UCX's file
       descriptor wakes `Progress`, which progresses the worker, completes futures and arms
       the descriptor again. Nothing polls, and no task is made per message.
    2. `connect` opens an endpoint and names the session in the first message, on the
       endpoint's own stream; `listen` reads it and hands the endpoint to `accept`.
    3. Endpoints have error handling, so the death of a peer ends every operation and calls
       `on_close`. `close` forces: UCX cancels what is posted, then cuts.
    4. Endpoints close before the listener, the listener before the worker.
    5. A sender that is killed while it writes to shared memory can leave the queue of this worker
       blocked for all others. It shows when peers connect and are not heard: after two of them the
       worker and its listener are opened anew. Endpoints of the old one end as lost ones do. The
       listener may move to another port: ucxx holds the old one as long as anything it accepted.

This uses the layer of ucxx below its asyncio front: that one waits by polling, and can neither
report nor bound a close. UCX binds its listener to every interface; a connection that does not
know a session id, which only the control plane gives out, is closed unread.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING, Any

from cluster.errors import ConfigError, ServingError
from kv_transfer.failures import FailureReason, failure
from kv_transfer.transports.ucx_endpoint import UcxEndpoint
from kv_transfer.transports.ucx_lanes import resources_of
from kv_transfer.transports.ucx_progress import Progress

if TYPE_CHECKING:
    import numpy as np
    import torch

    from kv_transfer.transports.base import Accept

logger = logging.getLogger(__name__)

_SHARED_MEMORY_NAMES = {"sm", "shm", "mm", "sysv", "posix"}
_MAX_UNHEARD = 2
_MAX_ARRAYS = 256


def _load() -> tuple[Any, Any]:
    """ucxx's modules; `ConfigError` where it is not installed, or finds no UCX that it can use."""
    try:
        from ucxx._lib import arr, libucxx
    except ModuleNotFoundError as error:
        missing = error.name or "ucxx"
        raise ConfigError(f"{missing} is not installed: pip install ucxx-cu13.") from error
    except ImportError as error:
        raise ConfigError(f"ucxx is installed, but cannot be loaded: {error}") from error
    # ucxx sets this on import for old versions of UCX; here it only makes UCX look up the kind
    # of each buffer again.
    os.environ.pop("UCX_MEMTYPE_CACHE", None)
    return libucxx, arr


def _options(ucx_tls: str | None, *, moves_device_memory: bool) -> dict[str, str]:
    """UCX uses shared memory between processes that survive each other's death only if told. In
    host memory it is told to put straight into the receiver's buffer: over TCP it would otherwise
    copy every byte twice more."""
    options = {"TCP_CM_REUSEADDR": "y"}  # the listener may take its own port again
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
    return resources_of(_open(libucx, {}, (libucx.Feature.TAG,)).info)


def _open(libucx: Any, options: dict[str, str], features: tuple[Any, ...]) -> Any:
    """A context of UCX; `ConfigError` where it finds nothing that it may use."""
    try:
        return libucx.UCXContext(options, feature_flags=features)
    except libucx.UCXError as error:
        asked = options.get("TLS", os.environ.get("UCX_TLS"))
        limits = "" if asked is None else f" among the transports {asked!r}"
        raise ConfigError(
            f"UCX finds nothing on this machine that it may use{limits}: {error}. See --ucx-tls, "
            "UCX_TLS and UCX_NET_DEVICES.",
            param="ucx_tls",
        ) from error


class UcxTransport:
    """One UCX worker on the running event loop."""

    def __init__(
        self, *, ucx_tls: str | None, moves_device_memory: bool, connect_seconds: float
    ) -> None:
        self._ucx, self._arr = _load()
        # Its own, and what its C++ library throws besides.
        self.errors = (self._ucx.UCXError, RuntimeError, MemoryError, OSError, ValueError)
        options = _options(ucx_tls, moves_device_memory=moves_device_memory)
        self._shares_memory = "SYSV_ERROR_HANDLING" in options
        feature = self._ucx.Feature
        self._context = _open(self._ucx, options, (feature.TAG, feature.STREAM, feature.WAKEUP))
        self._worker = self._ucx.UCXWorker(self._context)
        self.progress = Progress(self._worker, self.errors)
        self.moves_device_memory = moves_device_memory
        self._connect_seconds = connect_seconds
        self._listener: Any = None
        self._accept: Accept | None = None
        self._num_unheard = 0  # peers in a row that connected, and whose hello did not come
        self.num_reopenings = 0
        self._arrays: dict[tuple[int, int], Any] = {}
        self._endpoints: set[UcxEndpoint] = set()
        self._greeting: set[asyncio.Task[None]] = set()

    @property
    def name(self) -> str:
        return "ucx"

    @property
    def available(self) -> tuple[str, ...]:
        """UCX's names of the transports that it may use on this machine."""
        return resources_of(self._context.info)

    @property
    def port(self) -> int:
        return 0 if self._listener is None else int(self._listener.port)

    async def listen(self, host: str, port: int, accept: Accept) -> int:
        """Raises `ConfigError` when the port is taken."""
        self._accept = accept
        return self._bind(port)

    def _bind(self, port: int) -> int:
        try:
            self._listener = self._ucx.UCXListener.create(
                self._worker, port, self._on_connection, cb_args=(), deliver_endpoint=True
            )
        except self._ucx.UCXError as error:
            raise ConfigError(
                f"Port {port} cannot be used for KV transfer.", param="kv_port"
            ) from error
        return int(self._listener.port)

    async def connect(self, host: str, port: int, session_id: int) -> UcxEndpoint:
        try:
            raw = self._ucx.UCXEndpoint.create(self._worker, host, port, True)
        except self.errors as error:
            raise failure(FailureReason.LINK_LOST) from error
        endpoint = UcxEndpoint(self, raw)
        self._endpoints.add(endpoint)
        try:
            await asyncio.wait_for(endpoint.send_hello(session_id), self._connect_seconds)
        except (TimeoutError, ServingError, asyncio.CancelledError):
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
        """ucxx's view of a tensor, by the buffer protocol or by the CUDA array interface, which
        takes its time. Buffers serve again and again; a kept view keeps its memory, so that its
        address is no other's."""
        key = (buffer.data_ptr(), buffer.numel())
        array = self._arrays.get(key)
        if array is None:
            if len(self._arrays) >= _MAX_ARRAYS:
                self._arrays.clear()
            array = self._arrays[key] = self._arr.Array(
                buffer if buffer.is_cuda else buffer.numpy()
            )
        return array

    def array_of(self, data: np.ndarray[Any, np.dtype[np.uint8]]) -> Any:
        return self._arr.Array(data)

    def _on_connection(self, raw: Any) -> None:
        """Called by UCX inside progress."""
        endpoint = UcxEndpoint(self, raw)
        self._endpoints.add(endpoint)
        greeting = asyncio.get_running_loop().create_task(self._greet(endpoint))
        self._greeting.add(greeting)
        greeting.add_done_callback(self._greeting.discard)

    async def _greet(self, endpoint: UcxEndpoint) -> None:
        hello = asyncio.ensure_future(endpoint.recv_hello())
        # Not cancelled when it is late: UCX would keep a receive that nobody waits for.
        await asyncio.wait([hello], timeout=self._connect_seconds)
        is_late = not hello.done()
        if is_late:
            await endpoint.close()
        session_id = await _result_of(hello)
        self._num_unheard = self._num_unheard + 1 if is_late else 0
        if session_id is not None and self._accept is not None:
            self._accept(session_id, endpoint)
            return
        await endpoint.close()
        if self._shares_memory and self._num_unheard >= _MAX_UNHEARD:
            await self._open_anew()

    async def _open_anew(self) -> None:
        """See the module."""
        self._num_unheard = 0
        self.num_reopenings += 1
        endpoints, port = list(self._endpoints), self.port
        logger.error(
            "KV connections are not heard any more, as after the death of a peer that was writing "
            "to shared memory: opening UCX anew, which cuts %d connections", len(endpoints),
        )  # fmt: skip
        for endpoint in endpoints:
            await endpoint.close()
        self._listener = None
        self.progress.stop()
        self._worker = self._ucx.UCXWorker(self._context)
        self.progress = Progress(self._worker, self.errors)
        try:
            self._bind(port)
        except ConfigError:
            self._bind(0)
            logger.warning("KV is received on port %d now; %d is still held", self.port, port)


async def _result_of(hello: asyncio.Future[int | None]) -> int | None:
    try:
        return await hello
    except ServingError as error:
        logger.warning("a KV connection ended before it named its session: %s", error.message)
        return None
