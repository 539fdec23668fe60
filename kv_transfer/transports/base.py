"""What a transport must do: move tagged messages between memories it was given.

Life of an endpoint
    1. A node `listen`s; a peer `connect`s with the session id it was told over the control
       plane. Both get an `Endpoint`; the listener checks the id before it trusts it.
    2. `send` and `recv` post at once, in the order of the calls, and return a future that is
       done when the buffer may be reused. Messages match by tag; messages of one endpoint
       under one tag match in the order they were posted. Nothing can be cancelled: to stop a
       receive, close the endpoint.
    3. The connection breaks, or either side closes: every posted operation ends, with
       `TransferFailed` where it did not complete, and `on_close` is called once.

All methods are called on the event loop that created the transport.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import asyncio

    import torch


Piece = NDArray[np.uint8]
"""Bytes that lie together, `[num_bytes]`. An array, as memoryviews keep the garbage collector
busy."""


Examine = Callable[["Sequence[Piece]"], None]


class Endpoint(Protocol):
    """One connection to one peer. Buffers are contiguous uint8 tensors, host or device."""

    @property
    def transport_name(self) -> str:
        """What carries the payload: "loopback", "tcp", "shm", "rdma", "cuda_ipc"."""

    @property
    def lanes(self) -> tuple[str, ...]:
        """The same in finer names, for the log: what is connected under this endpoint."""

    def send(self, buffer: torch.Tensor, tag: int) -> asyncio.Future[None]: ...

    def recv(self, buffer: torch.Tensor, tag: int) -> asyncio.Future[None]:
        """A shorter message fills the front of `buffer`; a longer one fails the receive."""

    def on_close(self, callback: Callable[[], None]) -> None:
        """Call `callback` once when the connection ends, whoever ended it; at once if it has."""

    async def close(self) -> bool:
        """Cut the connection. True when no posted operation can touch memory any more; False
        when one did not end in time, so that its buffer must never be reused. Idempotent."""


@runtime_checkable
class PieceEndpoint(Endpoint, Protocol):
    """An endpoint in host memory that needs no buffer in one piece. The pieces of a message follow
    each other in it."""

    def send_pieces(
        self,
        pieces: Sequence[Piece],
        tag: int,
        examine: Examine | None = None,
        behind: Sequence[Piece] = (),
    ) -> asyncio.Future[None]:
        """`examine` gets the pieces in their order, some at a time, each once, on a thread of the
        endpoint's right after they were sent and while they are in the processor's cache. The
        pieces `behind` follow when it has had all: what it writes there is sent."""

    def recv_pieces(
        self,
        pieces: Sequence[Piece],
        tag: int,
        examine: Examine | None = None,
        behind: Sequence[Piece] = (),
    ) -> asyncio.Future[None]:
        """The other end: `examine` gets the pieces as they have come. The last one is the front of
        a piece, where the message ends in it."""


Accept = Callable[[int, Endpoint], None]
"""Called with the session id a peer named and its endpoint; closes it if the id is unknown."""


class Transport(Protocol):
    """The connections of one process."""

    @property
    def name(self) -> str: ...

    @property
    def port(self) -> int:
        """Of the listener, as it is now: a transport that had to open itself anew may have moved.
        0 without one."""

    async def listen(self, host: str, port: int, accept: Accept) -> int:
        """Start to accept; returns the port, which matters when 0 was asked for."""

    async def connect(self, host: str, port: int, session_id: int) -> Endpoint:
        """Raises `TransferFailed` when the peer cannot be reached in time."""

    async def close(self) -> None:
        """Close the endpoints, then the listener."""
