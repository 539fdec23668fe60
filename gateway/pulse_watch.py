"""Pings one node on a connection of its own, and says when it is silent.

Life of a watch
    1. A connection to the node's gRPC port, which nothing else uses: no frame of a session stands
       in front of a ping.
    2. A few times a second a ping goes out, less often while nobody waits for the node.
    3. `until_silent` returns when the node answers none of them any more (`pulse.py`).

A connection that ends says nothing of the node: that is for its session to tell. It is opened
again. A node that refuses pings is left alone for a while: the session's own question must do.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, cast

from gateway.http2_pings import GREETING, Http2Pings, PingsRefused, ping
from gateway.pulse import TICK_SECONDS, Pulse

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.clock import Clock

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
PAUSE_SECONDS = 1.0
REFUSED_SECONDS = 60.0


class PulseWatch:
    """`timeout`: see `Pulse`. `is_urgent`: whether somebody waits for the node."""

    def __init__(
        self, address: str, *, timeout: float, is_urgent: Callable[[], bool], clock: Clock
    ) -> None:
        self._host, _, self._port = address.rpartition(":")
        self._is_urgent = is_urgent
        self._clock = clock
        self._pulse = Pulse(timeout=timeout)  # what it has learnt outlives a connection

    async def until_silent(self) -> None:
        """Returns when the node has become silent."""
        while True:
            link = await self._connect()
            if link is not None:
                try:
                    await self._ask(link)
                finally:
                    link.close()
                if self._pulse.is_silent:
                    return
                if link.is_refused:
                    logger.warning("the node at %s:%s takes no pings", self._host, self._port)
                    await asyncio.sleep(REFUSED_SECONDS)
            await asyncio.sleep(PAUSE_SECONDS)

    async def _connect(self) -> _Link | None:
        """None when there is no connection to be had."""
        loop = asyncio.get_running_loop()
        host = self._host.strip("[]")
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                _, link = await loop.create_connection(
                    lambda: _Link(self._pulse, self._clock), host, int(self._port)
                )
        except (OSError, TimeoutError):
            return None
        return link

    async def _ask(self, link: _Link) -> None:
        """Until the connection ends or the node is silent."""
        pulse = self._pulse
        pulse.opened(self._clock())
        while not link.is_closed:
            number = pulse.tick(self._clock(), is_urgent=self._is_urgent())
            if pulse.is_silent:
                return
            if number is not None:
                link.send(ping(number))
            await asyncio.sleep(TICK_SECONDS)


class _Link(asyncio.Protocol):
    """One connection. Answers are noted when they come, not when the next ping is due."""

    def __init__(self, pulse: Pulse, clock: Clock) -> None:
        self.is_closed = False
        self.is_refused = False
        self._pulse = pulse
        self._clock = clock
        self._pings = Http2Pings()
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(GREETING)

    def data_received(self, data: bytes) -> None:
        try:
            numbers, reply = self._pings.feed(data)
        except PingsRefused as refused:
            logger.debug("pings are refused: %s", refused)
            self.is_refused = True
            self._transport.abort()
            return
        for number in numbers:
            self._pulse.answered(number, self._clock())
        if reply:
            self.send(reply)

    def connection_lost(self, error: Exception | None) -> None:
        self.is_closed = True

    def send(self, data: bytes) -> None:
        if not self.is_closed:
            self._transport.write(data)

    def close(self) -> None:
        """At once: a peer that reads nothing would keep what was sent."""
        self._transport.abort()
