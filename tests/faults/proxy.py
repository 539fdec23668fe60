"""A TCP proxy that does to a connection what a bad network does, and counts what it did.

Life of a connection
    1. A client connects to `port`; the proxy connects to the target.
    2. Each way is pumped by its own task, which treats each piece by the `Faults` of that way as
       they are at that moment: `faults_up` towards the target, `faults_down` towards the client.
       They may be replaced at any time, and `heal` puts both back. What was held in a blackhole
       passes then, late and whole, as TCP would send it again.
    3. The end of one way is passed on as FIN; RST ends both at once (SO_LINGER of zero).

Offsets count the bytes of one connection and one way. `counters` is how a test verifies that its
fault took place: a fault that was never reached leaves its counter at zero.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PIECE_BYTES = 1 << 14
HEALED_POLL_SECONDS = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What happens to one way. Offsets are bytes of a connection; None: never."""

    delay_seconds: float = 0.0
    jitter_seconds: float = 0.0  # more delay, drawn from the seed
    bytes_per_second: float | None = None
    is_blackholed: bool = False  # nothing passes, no FIN and no RST, until it heals
    reset_after: int | None = None  # pass on that many bytes, then RST to both sides
    truncate_after: int | None = None  # pass on that many bytes, then FIN; the rest is thrown away
    flip_at: int | None = None  # one drawn bit of the byte there
    duplicate_at: int | None = None  # the piece that has this byte passes twice

    @property
    def cut_at(self) -> int | None:
        ends = [end for end in (self.reset_after, self.truncate_after) if end is not None]
        return min(ends, default=None)


class FaultProxy:
    """Counters: connections, bytes_up, bytes_down, and of each fault: delayed, held (for the
    rate), blackholed (bytes), reset, truncated, flipped, duplicated.

    `listen`: host and port of the proxy; port 0 takes a free one."""

    def __init__(
        self, host: str, port: int, *, seed: int, listen: tuple[str, int] = ("127.0.0.1", 0)
    ) -> None:
        self._target = host, port
        self._listen = listen
        self._random = random.Random(seed)
        self._ways: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.faults_up = self.faults_down = Faults()
        self.counters: Counter[str] = Counter()
        self.port = 0

    def heal(self) -> None:
        """What comes from here on passes untouched, also on open connections."""
        self.faults_up = self.faults_down = Faults()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, *self._listen, limit=PIECE_BYTES)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for way in list(self._ways):
            way.cancel()
        if self._ways:
            await asyncio.wait(self._ways)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.counters["connections"] += 1
        try:
            there, back = await asyncio.open_connection(*self._target, limit=PIECE_BYTES)
        except OSError:
            reset(writer)
            return
        pair = (writer, back)
        ways = [
            asyncio.create_task(_Way(self, "up", reader, back, pair).pump()),
            asyncio.create_task(_Way(self, "down", there, writer, pair).pump()),
        ]
        self._ways.update(ways)
        for way in ways:
            way.add_done_callback(self._ways.discard)
        try:
            await asyncio.wait(ways)
        finally:
            for each in pair:
                each.close()

    def draw(self, limit: float) -> float:
        return self._random.uniform(0.0, limit)

    def draw_bit(self) -> int:
        return 1 << self._random.randrange(8)


class _Way:
    """One direction of one connection."""

    def __init__(
        self,
        proxy: FaultProxy,
        name: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        pair: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
    ) -> None:
        self._proxy, self._name = proxy, name
        self._reader, self._writer, self._pair = reader, writer, pair
        self._num_bytes = 0
        self._is_cut = False

    @property
    def _faults(self) -> Faults:
        return self._proxy.faults_up if self._name == "up" else self._proxy.faults_down

    async def pump(self) -> None:
        try:
            while piece := await self._reader.read(PIECE_BYTES):
                if not self._is_cut:
                    await self._pass_on(bytearray(piece))
            if not self._is_cut and not self._writer.is_closing():
                self._writer.write_eof()
        except OSError:
            for each in self._pair:
                reset(each)

    async def _pass_on(self, piece: bytearray) -> None:
        await self._wait_for(len(piece))
        await self._wait_in_blackhole(len(piece))
        faults, counters = self._faults, self._proxy.counters
        begin, self._num_bytes = self._num_bytes, self._num_bytes + len(piece)
        if faults.flip_at is not None and begin <= faults.flip_at < self._num_bytes:
            piece[faults.flip_at - begin] ^= self._proxy.draw_bit()
            counters["flipped"] += 1
        if faults.duplicate_at is not None and begin <= faults.duplicate_at < self._num_bytes:
            piece = piece + piece
            counters["duplicated"] += 1
        if faults.cut_at is not None and self._num_bytes >= faults.cut_at:
            self._is_cut = True
            del piece[max(0, faults.cut_at - begin) :]
        self._writer.write(piece)
        counters[f"bytes_{self._name}"] += len(piece)
        await self._writer.drain()
        if self._is_cut:
            self._cut(by_reset=faults.cut_at == faults.reset_after)

    async def _wait_for(self, num_bytes: int) -> None:
        faults, counters = self._faults, self._proxy.counters
        if faults.delay_seconds or faults.jitter_seconds:
            counters["delayed"] += 1
            await asyncio.sleep(faults.delay_seconds + self._proxy.draw(faults.jitter_seconds))
        if faults.bytes_per_second is not None:
            counters["held"] += 1
            await asyncio.sleep(num_bytes / faults.bytes_per_second)

    async def _wait_in_blackhole(self, num_bytes: int) -> None:
        if self._faults.is_blackholed:
            self._proxy.counters["blackholed"] += num_bytes
        while self._faults.is_blackholed:  # noqa: ASYNC110 (set by other threads)
            await asyncio.sleep(HEALED_POLL_SECONDS)

    def _cut(self, *, by_reset: bool) -> None:
        if by_reset:
            self._proxy.counters["reset"] += 1
            for each in self._pair:
                reset(each)
        else:
            self._proxy.counters["truncated"] += 1
            self._writer.write_eof()


def reset(writer: asyncio.StreamWriter) -> None:
    """End a connection by RST."""
    connection: socket.socket = writer.get_extra_info("socket")
    if connection.fileno() >= 0:
        linger = struct.pack("ii", 1, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


@asynccontextmanager
async def fault_proxy(host: str, port: int, *, seed: int) -> AsyncIterator[FaultProxy]:
    proxy = FaultProxy(host, port, seed=seed)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.close()
