"""The two threads of a TCP connection: one sends, one receives, mostly inside the kernel.

A call moves as much as the processor's second-level cache holds: who examines the bytes, as soon
as they were sent or have come, reads them from there. The kernel is better at fetching them from
memory, which is why the sender examines them after it, too.

A thread ends when the socket breaks or is shut down, or when it is told to stop. What it was
doing and all that was posted to it then fails, from that thread: so whoever sees the failure
knows that nothing touches the memory any more.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import struct
import threading
from collections import defaultdict, deque
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.isolation import isolated
from kv_transfer.failures import FailureReason, failure
from kv_transfer.transports.piece_batches import after_first, batches

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable, Sequence

    from kv_transfer.transports.base import Examine, Piece

logger = logging.getLogger(__name__)

_ENVELOPE = struct.Struct("<QQ")  # tag, length
_LOOK_SECONDS = 0.1
_SMALL_BYTES = 64 * 1024  # a message that may pass a larger one


class Posted:
    """An operation: where its bytes are, and the future that the loop's thread waits for."""

    __slots__ = (
        "_loop", "behind", "done", "examine", "front_bytes", "num_bytes", "pieces", "tag",
        "was_passed",
    )  # fmt: skip

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        tag: int,
        pieces: Sequence[Piece],
        examine: Examine | None = None,
        behind: Sequence[Piece] = (),
    ) -> None:
        self._loop = loop
        self.done: asyncio.Future[None] = loop.create_future()
        self.tag = tag
        self.pieces = pieces
        self.examine = examine
        self.behind = behind
        self.front_bytes = sum([piece.nbytes for piece in pieces])
        self.num_bytes = self.front_bytes + sum([piece.nbytes for piece in behind])
        self.was_passed = False

    def end(self, reason: FailureReason | None = None) -> None:
        """From any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._resolve, reason)

    def _resolve(self, reason: FailureReason | None) -> None:
        if self.done.done():
            return
        if reason is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(failure(reason))


class _Worker:
    """A thread over one direction of the socket."""

    def __init__(self, connection: socket.socket, on_broken: Callable[[], None], name: str) -> None:
        self._socket = connection
        self._on_broken = on_broken
        self._changed = threading.Condition()
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def post(self, posted: Posted) -> None:
        with self._changed:
            if not self._is_stopped:
                self._add(posted)
                self._changed.notify()
                return
        posted.end(FailureReason.LINK_LOST)

    def stop(self) -> None:
        """The socket was shut down already, so no call blocks."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify()

    def join(self, seconds: float) -> bool:
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        isolated(self._move_all, "a KV connection is given up", logger)
        with self._changed:
            self._is_stopped = True
            left = list(self._take_all())
        for posted in left:
            posted.end(FailureReason.LINK_LOST)
        self._on_broken()

    def _move_all(self) -> None:
        try:
            while self._move_one():
                pass
        except OSError as error:
            logger.debug("a KV connection broke: %s", error)

    def _move_one(self) -> bool:
        """Move one message; False when there is nothing more to do."""
        raise NotImplementedError

    def _add(self, posted: Posted) -> None:
        raise NotImplementedError

    def _take_all(self) -> Iterable[Posted]:
        raise NotImplementedError


class Sending(_Worker):
    def __init__(self, connection: socket.socket, on_broken: Callable[[], None]) -> None:
        self._queue: deque[Posted] = deque()
        super().__init__(connection, on_broken, "kv-tcp-send")

    def _add(self, posted: Posted) -> None:
        self._queue.append(posted)

    def _take_all(self) -> Iterable[Posted]:
        taken, self._queue = self._queue, deque()
        return taken

    def _move_one(self) -> bool:
        posted = self._next()
        if posted is None:
            return False
        envelope = np.frombuffer(_ENVELOPE.pack(posted.tag, posted.num_bytes), dtype=np.uint8)
        self._write([envelope], _ENVELOPE.size, socket.MSG_MORE if posted.num_bytes else 0)
        for batch, num_bytes in batches(posted.pieces, posted.front_bytes):
            self._write(batch, num_bytes)
            if posted.examine is not None:
                posted.examine(batch)
        self._write(list(posted.behind), posted.num_bytes - posted.front_bytes)
        with self._changed:
            self._queue.popleft()
        posted.end()
        return True

    def _next(self) -> Posted | None:
        """The front of the queue; it stays there until its bytes have left."""
        with self._changed:
            while not self._queue and not self._is_stopped:
                self._changed.wait()
            if self._is_stopped:
                return None
            self._let_pass()
            return self._queue[0]

    def _let_pass(self) -> None:
        """One header may pass the payload in front of it: the receiver gets the next payload ready
        while it takes this one. No more than one, as few receives of headers are posted."""
        if len(self._queue) < 2:
            return
        first, second = self._queue[0], self._queue[1]
        if first.was_passed or first.tag == second.tag:
            return
        if second.num_bytes <= _SMALL_BYTES < first.num_bytes:
            first.was_passed = True
            self._queue[0], self._queue[1] = second, first

    def _write(self, pieces: list[Any], num_bytes: int, flags: int = 0) -> None:
        while num_bytes:
            sent = self._socket.sendmsg(pieces, (), flags)
            num_bytes -= sent
            if num_bytes:
                pieces = after_first(pieces, sent)


class Receiving(_Worker):
    def __init__(self, connection: socket.socket, on_broken: Callable[[], None]) -> None:
        self._wanted: dict[int, deque[Posted]] = defaultdict(deque)
        self._envelope = np.zeros(_ENVELOPE.size, dtype=np.uint8)
        super().__init__(connection, on_broken, "kv-tcp-recv")

    def _add(self, posted: Posted) -> None:
        self._wanted[posted.tag].append(posted)

    def _take_all(self) -> Iterable[Posted]:
        taken, self._wanted = self._wanted, defaultdict(deque)
        return (posted for queue in taken.values() for posted in queue)

    def _move_one(self) -> bool:
        if not self._fill([self._envelope], _ENVELOPE.size):
            return False
        tag, num_bytes = _ENVELOPE.unpack(self._envelope.tobytes())
        posted = self._wait_for(tag)
        if posted is None:
            return False
        if num_bytes > posted.num_bytes:
            # What follows could not be told from the rest of it: the connection is of no use.
            self._drop(tag)
            posted.end(FailureReason.FRAME_MALFORMED)
            return False
        front_bytes = min(num_bytes, posted.front_bytes)
        if not self._fill(posted.pieces, front_bytes, posted.examine):
            return False
        if not self._fill(posted.behind, num_bytes - front_bytes):
            return False
        self._drop(tag)
        posted.end()
        return True

    def _wait_for(self, tag: int) -> Posted | None:
        """The receive posted for `tag`; it stays posted until its bytes are there."""
        with self._changed:
            while not self._wanted.get(tag):
                if self._is_stopped or _is_reset(self._socket):
                    return None
                self._changed.wait(_LOOK_SECONDS)
            return self._wanted[tag][0]

    def _drop(self, tag: int) -> None:
        with self._changed:
            queue = self._wanted[tag]
            queue.popleft()
            if not queue:
                del self._wanted[tag]

    def _fill(
        self, pieces: Sequence[Piece], num_bytes: int, examine: Examine | None = None
    ) -> bool:
        """The next `num_bytes` of the stream, into the front of `pieces`; False at its end."""
        for batch, size in batches(pieces, num_bytes):
            if not self._read(batch, size):
                return False
            if examine is not None:
                examine(batch)
        return True

    def _read(self, pieces: list[Any], num_bytes: int) -> bool:
        while num_bytes:
            received, *_ = self._socket.recvmsg_into(pieces, 0, socket.MSG_WAITALL)
            if received == 0:
                return False
            num_bytes -= received
            if num_bytes:
                pieces = after_first(pieces, received)
        return True


def _is_reset(connection: socket.socket) -> bool:
    """Whether the peer is gone. Asked while nothing is read, which would tell."""
    poll = select.poll()
    poll.register(connection, 0)
    return bool(poll.poll(0))
