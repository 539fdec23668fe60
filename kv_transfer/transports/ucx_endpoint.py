"""One end of a UCX connection: posted messages, and what becomes of them when it breaks."""

from __future__ import annotations

import asyncio
import logging
import struct
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from kv_transfer.failures import FailureReason, failure
from kv_transfer.transports.closes_once import ClosesOnce
from kv_transfer.transports.ucx_lanes import carrier, lanes_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from kv_transfer.transports.ucx_progress import Progress

logger = logging.getLogger(__name__)

_HELLO = struct.Struct("<8sQ")
_HELLO_MAGIC = b"BATONKV1"
_CLOSE_SECONDS = 2.0


class Worker(Protocol):
    """What an endpoint needs of the transport that it belongs to."""

    @property
    def moves_device_memory(self) -> bool: ...
    @property
    def progress(self) -> Progress: ...
    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """What ucxx raises."""

    def tag(self, tag: int) -> Any: ...
    def array(self, buffer: torch.Tensor) -> Any: ...
    def array_of(self, data: np.ndarray[Any, np.dtype[np.uint8]]) -> Any: ...
    def forget(self, endpoint: UcxEndpoint) -> None: ...


class UcxEndpoint(ClosesOnce):
    """One UCX endpoint, with the operations posted on it."""

    def __init__(self, transport: Worker, endpoint: Any) -> None:
        super().__init__()
        self._transport = transport
        self._endpoint = endpoint
        self._posted: set[asyncio.Future[None]] = set()
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

    async def close(self) -> bool:
        self._end_once()
        if self._endpoint is None:
            return not self._posted
        # Cancels what is posted, then cuts; it progresses the worker until the cut is done,
        # which with a forced close does not wait for the peer.
        self._endpoint.close_blocking()
        self._transport.progress.kick()
        if self._posted:
            await asyncio.wait(self._posted, timeout=_CLOSE_SECONDS)
        self._transport.forget(self)
        self._endpoint = None  # it holds its listener, and so the port
        return not self._posted

    def _post(
        self, post: Callable[[], Any], array: Any, *, on_device: bool = False
    ) -> asyncio.Future[None]:
        if self._is_closed:
            return self._refused()
        try:
            request = post()
        except self._transport.errors:
            logger.debug("UCX refused an operation", exc_info=True)
            return self._refused()
        future = self._transport.progress.watch(request, array, on_device=on_device)
        self._posted.add(future)
        future.add_done_callback(self._posted.discard)
        return future

    def _refused(self) -> asyncio.Future[None]:
        """For the caller, the link is gone."""
        refused: asyncio.Future[None] = self._loop.create_future()
        refused.set_exception(failure(FailureReason.LINK_LOST))
        return refused

    def _on_ucx_close(self) -> None:
        """Called by UCX inside progress, where no UCX call is allowed."""
        self._loop.call_soon(self._end_once)
