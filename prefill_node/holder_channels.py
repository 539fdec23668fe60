"""Channels to the nodes whose prefixes are asked for: kept, but only of those asked last.

Nodes come and go under new addresses for as long as this process lives.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import grpc

MAX_CHANNELS = 64  # more than fetches at a time


class HolderChannels:
    """By address."""

    def __init__(self, open_channel: Callable[[str], grpc.aio.Channel]) -> None:
        self._open_channel = open_channel
        self._channels: OrderedDict[str, grpc.aio.Channel] = OrderedDict()
        self._closing: set[asyncio.Task[None]] = set()

    def get(self, address: str) -> grpc.aio.Channel:
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = self._open_channel(address)
            if len(self._channels) > MAX_CHANNELS:
                self._close(self._channels.popitem(last=False)[1])
        self._channels.move_to_end(address)
        return channel

    async def close(self) -> None:
        while self._channels:
            self._close(self._channels.popitem()[1])
        await asyncio.gather(*self._closing, return_exceptions=True)

    def _close(self, channel: grpc.aio.Channel) -> None:
        closing = asyncio.get_running_loop().create_task(channel.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
