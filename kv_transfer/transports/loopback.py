"""The in-process twin of a transport: same rules, no network, no second process.

A send completes only when the peer has received it, as a rendezvous does, so a receiver that
stops receiving is seen by the sender. Used by tests and by nodes that share a process.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kv_transfer.failures import FailureReason, failure
from kv_transfer.transports.closes_once import ClosesOnce

if TYPE_CHECKING:
    from kv_transfer.transports.base import Accept


@dataclass(slots=True)
class _Posted:
    buffer: torch.Tensor
    done: asyncio.Future[None]


class LoopbackEndpoint(ClosesOnce):
    """One end of a pair. Messages wait at the receiving end until both sides have posted."""

    def __init__(self) -> None:
        super().__init__()
        self._peer: LoopbackEndpoint
        self._arrived: dict[int, deque[_Posted]] = defaultdict(deque)
        self._wanted: dict[int, deque[_Posted]] = defaultdict(deque)

    @classmethod
    def pair(cls) -> tuple[LoopbackEndpoint, LoopbackEndpoint]:
        left, right = cls(), cls()
        left._peer, right._peer = right, left
        return left, right

    @property
    def transport_name(self) -> str:
        return "loopback"

    @property
    def lanes(self) -> tuple[str, ...]:
        return ("loopback",)

    def send(self, buffer: torch.Tensor, tag: int) -> asyncio.Future[None]:
        posted = self._post(buffer)
        if not posted.done.done():
            self._peer._arrived[tag].append(posted)
            self._peer._match(tag)
        return posted.done

    def recv(self, buffer: torch.Tensor, tag: int) -> asyncio.Future[None]:
        posted = self._post(buffer)
        if not posted.done.done():
            self._wanted[tag].append(posted)
            self._match(tag)
        return posted.done

    async def close(self) -> bool:
        self._end()
        self._peer._end()
        return True

    def _post(self, buffer: torch.Tensor) -> _Posted:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._is_closed:
            done.set_exception(failure(FailureReason.LINK_LOST))
        return _Posted(buffer, done)

    def _match(self, tag: int) -> None:
        arrived, wanted = self._arrived[tag], self._wanted[tag]
        while arrived and wanted:
            receive = wanted.popleft()
            if not receive.done.cancelled():
                self._deliver(arrived.popleft(), receive)
        if not arrived:
            del self._arrived[tag]
        if not wanted:
            del self._wanted[tag]

    def _deliver(self, message: _Posted, receive: _Posted) -> None:
        num_bytes = message.buffer.numel()
        if num_bytes > receive.buffer.numel():
            receive.done.set_exception(failure(FailureReason.FRAME_MALFORMED))
        else:
            receive.buffer[:num_bytes].copy_(message.buffer)
            if receive.buffer.is_cuda:  # what has arrived is seen by every stream
                torch.cuda.current_stream(receive.buffer.device).synchronize()
            receive.done.set_result(None)
        message.done.set_result(None)

    def _end(self) -> None:
        self._end_once(self._drop_posted)

    def _drop_posted(self) -> None:
        for queue in (*self._arrived.values(), *self._wanted.values()):
            for posted in queue:
                if not posted.done.done():
                    posted.done.set_exception(failure(FailureReason.LINK_LOST))
        self._arrived.clear()
        self._wanted.clear()


class LoopbackNetwork:
    """The listeners that transports of one process can reach, by port."""

    def __init__(self) -> None:
        self._listeners: dict[int, LoopbackTransport] = {}
        self._next_port = 1

    def bind(self, transport: LoopbackTransport, port: int) -> int:
        if port == 0:
            while self._next_port in self._listeners:
                self._next_port += 1
            port = self._next_port
        self._listeners[port] = transport
        return port

    def unbind(self, port: int) -> None:
        self._listeners.pop(port, None)

    def listener(self, port: int) -> LoopbackTransport | None:
        return self._listeners.get(port)


class LoopbackTransport:
    def __init__(self, network: LoopbackNetwork) -> None:
        self._network = network
        self._accept: Accept | None = None
        self._port = 0
        self._endpoints: list[LoopbackEndpoint] = []

    @property
    def name(self) -> str:
        return "loopback"

    @property
    def port(self) -> int:
        return self._port

    async def listen(self, host: str, port: int, accept: Accept) -> int:
        self._accept = accept
        self._port = self._network.bind(self, port)
        return self._port

    async def connect(self, host: str, port: int, session_id: int) -> LoopbackEndpoint:
        listener = self._network.listener(port)
        if listener is None or listener._accept is None:
            raise failure(FailureReason.LINK_LOST)
        ours, theirs = LoopbackEndpoint.pair()
        self._endpoints.append(ours)
        listener._endpoints.append(theirs)
        listener._accept(session_id, theirs)
        return ours

    async def close(self) -> None:
        endpoints, self._endpoints = self._endpoints, []
        for endpoint in endpoints:
            await endpoint.close()
        self._network.unbind(self._port)
        self._accept = None
