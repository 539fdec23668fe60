"""Short messages of one endpoint, from buffers that serve again: a transport takes longer to get to
know a buffer than to send what is in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import asyncio

    from kv_transfer.transports.base import Endpoint


class SmallMessages:
    """All under one tag. Should one not arrive, the link is lost, which others tell."""

    def __init__(self, endpoint: Endpoint, tag: int, num_bytes: int) -> None:
        """`num_bytes`: of each message."""
        self._endpoint, self._tag, self._num_bytes = endpoint, tag, num_bytes
        self._free: list[torch.Tensor] = []

    def send(self, message: bytes) -> None:
        buffer = self._free.pop() if self._free else torch.empty(self._num_bytes, dtype=torch.uint8)
        buffer.numpy().data[:] = message
        sent = self._endpoint.send(buffer, self._tag)
        sent.add_done_callback(lambda done: self._sent(buffer, done))

    def _sent(self, buffer: torch.Tensor, done: asyncio.Future[None]) -> None:
        if not done.cancelled() and done.exception() is None:
            self._free.append(buffer)
