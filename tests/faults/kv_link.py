"""KV links that a test can spoil while a node runs, between the node and its real transport.

Life of an order
    1. The test writes `FOLDER/order`: what to do to how many frames (`Order`).
    2. The sender's link reads it with its next frame, and takes one shot for each frame that it
       spoils; a frame is a header message and the payload message that follows it. Commits pass,
       unless the link swallows all.
    3. Each shot adds a line to `FOLDER/done`: how the test verifies that it took place.
    4. The order ends when its shots are used up or its file is gone.

Frames of one link keep their order, unless the order is to break it.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kv_transfer.failures import FailureReason, failure
from kv_transfer.protocol import COMMIT_MAGIC
from tests.faults.spoiled_bytes import Spoil, copy_of, spoil_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from kv_transfer.transports.base import Accept, Endpoint, Transport

KEPT_FRAMES = 4
CUTS = frozenset({Spoil.CUT_BEFORE_HEADER, Spoil.CUT_BEFORE_PAYLOAD, Spoil.CUT_AFTER_PAYLOAD})


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """`shots`: how many frames; `skip`: how many are left alone before."""

    spoil: Spoil
    shots: int = 1
    skip: int = 0
    seconds: float = 0.0
    bytes_per_second: float = 0.0

    def write(self, folder: Path) -> None:
        """Give it to the node whose folder this is; what earlier orders did is forgotten."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "done").unlink(missing_ok=True)
        fresh = folder / "order.new"
        fresh.write_text(json.dumps(asdict(self)))
        fresh.rename(folder / "order")


def withdraw(folder: Path) -> None:
    (folder / "order").unlink(missing_ok=True)


def shots_done(folder: Path) -> int:
    try:
        return len((folder / "done").read_text().splitlines())
    except OSError:
        return 0


class Orders:
    """The sender's side of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read_at: int | None = None
        self._order: Order | None = None
        self._num_left = self._num_skipped = 0

    def next(self) -> Order | None:
        """What to do to the frame that comes now."""
        path = self._folder / "order"
        try:
            written_at = path.stat().st_mtime_ns
            if written_at != self._read_at:
                fields = json.loads(path.read_text())
                self._order = Order(**{**fields, "spoil": Spoil(fields["spoil"])})
                self._read_at, self._num_skipped = written_at, 0
                self._num_left = self._order.shots
        except FileNotFoundError:
            return None
        if self._order is None or self._num_left == 0:
            return None
        if self._num_skipped < self._order.skip:
            self._num_skipped += 1
            return None
        self._num_left -= 1
        return self._order

    def done(self, order: Order) -> None:
        with (self._folder / "done").open("a") as file:
            file.write(f"{order.spoil}\n")


class SpoiledTransport:
    """A transport whose connecting side follows orders."""

    def __init__(self, inner: Transport, folder: str) -> None:
        self._inner = inner
        self._orders = Orders(Path(folder))

    @property
    def name(self) -> str:
        return self._inner.name

    @property
    def port(self) -> int:
        return self._inner.port

    async def listen(self, host: str, port: int, accept: Accept) -> int:
        return await self._inner.listen(host, port, accept)

    async def connect(self, host: str, port: int, session_id: int) -> Endpoint:
        endpoint = await self._inner.connect(host, port, session_id)
        return SpoiledEndpoint(endpoint, self._orders)

    async def close(self) -> None:
        await self._inner.close()


@dataclass(slots=True)
class Message:
    buffer: torch.Tensor
    tag: int
    ended: asyncio.Future[None]


class SpoiledEndpoint:
    """Sends go through a queue, so that what is held back holds back what follows."""

    def __init__(self, inner: Endpoint, orders: Orders) -> None:
        self._inner = inner
        self._orders = orders
        self._header: Message | None = None
        self._queue: asyncio.Queue[tuple[Message, ...]] = asyncio.Queue()
        self._kept: deque[torch.Tensor] = deque(maxlen=KEPT_FRAMES)
        self._at_hand: list[Message] = []  # while it is being spoiled
        self._held: tuple[Message, Message] | None = None
        self._unsent: list[Message] = []
        self._is_swallowing = False
        self._late: set[asyncio.Task[None]] = set()
        self._pump: asyncio.Task[None] | None = None
        inner.on_close(self._on_close)

    @property
    def transport_name(self) -> str:
        return self._inner.transport_name

    @property
    def lanes(self) -> tuple[str, ...]:
        return self._inner.lanes

    def recv(self, buffer: torch.Tensor, tag: int) -> asyncio.Future[None]:
        return self._inner.recv(buffer, tag)

    def on_close(self, callback: Callable[[], None]) -> None:
        self._inner.on_close(callback)

    async def close(self) -> bool:
        for task in [*self._late, *([self._pump] if self._pump else [])]:
            task.cancel()
        is_quiet = await self._inner.close()
        self._on_close()
        return is_quiet

    def send(self, buffer: torch.Tensor, tag: int) -> asyncio.Future[None]:
        message = Message(buffer, tag, asyncio.get_running_loop().create_future())
        if self._header is None and not is_commit(buffer):
            self._header = message
            return message.ended
        messages = (message,) if self._header is None else (self._header, message)
        self._header = None
        if self._pump is None:
            self._pump = asyncio.create_task(self._run())
        self._queue.put_nowait(messages)
        return message.ended

    # ---- the queue -------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            messages = await self._queue.get()
            held = self._held
            if len(messages) == 1:
                self._post(*messages)
            else:
                await self._pass_frame(*messages)
            if held is None or self._held is None:  # nothing is, or it has ended with the link
                continue
            self._post(*held)  # a last frame has no other behind it: it follows its commit
            self._held = None if self._held is held else self._held

    async def _pass_frame(self, header: Message, payload: Message) -> None:
        order = self._orders.next()
        if order is None:
            self._post(header, payload)
        else:
            self._at_hand = [header, payload]
            await self._spoil(order, header, payload)
            self._at_hand = []
            if order.spoil not in CUTS:
                self._orders.done(order)
        self._kept.append(copy_of(payload.buffer))

    def _post(self, *messages: Message) -> None:
        for message in messages:
            if self._is_swallowing:
                message.ended.set_result(None)
                continue
            _settle_as(self._inner.send(message.buffer, message.tag), message.ended)

    async def _spoil(self, order: Order, header: Message, payload: Message) -> None:
        match order.spoil:
            case Spoil.DELAY:
                await asyncio.sleep(order.seconds)
                self._post(header, payload)
            case Spoil.RATE:
                await asyncio.sleep(payload.buffer.numel() / order.bytes_per_second)
                self._post(header, payload)
            case Spoil.BLACKHOLE:
                self._unsent += [header, payload]
            case Spoil.SWALLOW:
                self._is_swallowing = True
                self._post(header, payload)
            case Spoil.REORDER:
                self._held = (header, payload)
            case Spoil.DUPLICATE | Spoil.LATE:
                copies = self._copy(header), self._copy(payload)
                self._post(header, payload)
                late = asyncio.create_task(self._again(order.seconds, *copies))
                self._late.add(late)
            case spoil if spoil in CUTS:
                await self._cut(order, header, payload)
            case _:
                spoil_bytes(order.spoil, header, payload, self._kept)
                self._post(header, payload)

    async def _again(self, seconds: float, *messages: Message) -> None:
        await asyncio.sleep(seconds)
        self._post(*messages)

    async def _cut(self, order: Order, header: Message, payload: Message) -> None:
        if order.spoil is not Spoil.CUT_BEFORE_HEADER:
            self._post(header)
            await asyncio.wait([header.ended])
        if order.spoil is Spoil.CUT_AFTER_PAYLOAD:
            self._post(payload)
            await asyncio.wait([payload.ended])
        self._orders.done(order)  # who sees the end of the connection may end this task
        await self._inner.close()
        self._on_close()

    def _copy(self, message: Message) -> Message:
        ended = asyncio.get_running_loop().create_future()
        ended.add_done_callback(lambda done: done.exception())  # nobody else looks at it
        return Message(copy_of(message.buffer), message.tag, ended)

    def _on_close(self) -> None:
        """What was never posted ends with the connection."""
        lost = [*self._unsent, *self._at_hand, *(self._held or ())]
        while not self._queue.empty():
            lost += self._queue.get_nowait()
        if self._header is not None:
            lost.append(self._header)
        self._unsent, self._at_hand, self._held, self._header = [], [], None, None
        for message in lost:
            if not message.ended.done():
                message.ended.set_exception(failure(FailureReason.LINK_LOST))


def is_commit(message: torch.Tensor) -> bool:
    """It has no payload, and no order spoils it."""
    return not message.is_cuda and message[:4].numpy().tobytes() == COMMIT_MAGIC


def _settle_as(source: asyncio.Future[None], target: asyncio.Future[None]) -> None:
    def settle(done: asyncio.Future[None]) -> None:
        if target.done():
            return
        error = done.exception()
        if error is None:
            target.set_result(None)
        else:
            target.set_exception(error)

    source.add_done_callback(settle)
