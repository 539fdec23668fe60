"""Tokens of all sequences of a step, in one frame per gateway, over one stream per gateway.

Life of a session
    1. `open`: a gateway's stream begins. A second stream under the same id drops the first and
       is refused once: what ran for the first is ended before anything runs for the next.
    2. `publish` queues deltas; what waits for one sequence is merged. Never blocks.
    3. Iterating the session takes what has gathered, as `Step` frames small enough to send.
    4. A gateway that does not read lets its queue grow to the bound: the session is dropped, the
       task that serves it cancelled (it may hang in a write), and the node hears of it as of
       any end of a stream: what ran for that gateway is aborted.

Everything here belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from cluster.delta_codec import encode_delta
from cluster.errors import NodeUnavailable
from cluster.proto import node_pb2 as pb
from cluster.request import TokenDelta

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cluster.errors import ServingError
    from cluster.request import TokenLogprobs

logger = logging.getLogger(__name__)
MAX_PENDING_BYTES = 16 * 2**20
MAX_FRAME_BYTES = 2**20  # far below the message limit: sizes here are estimates

_MAX_MERGED_BYTES = MAX_FRAME_BYTES // 4
_DELTA_BYTES = 64
_TOKEN_BYTES = 5
_LOGPROB_BYTES = 9


@dataclass(slots=True)
class _Pending:
    """What waits for one sequence: a first delta, and the tokens that came after it."""

    delta: TokenDelta
    num_bytes: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    last: TokenDelta | None = None

    def accepts(self, delta: TokenDelta, num_bytes: int) -> bool:
        """Only tokens after tokens: `started` and `handed_off` keep a delta of their own."""
        return (
            not (delta.started or delta.handed_off)
            and delta.num_cached_tokens is None
            and bool(delta.logprobs) == bool(self.delta.logprobs)
            and self.num_bytes + num_bytes <= _MAX_MERGED_BYTES
        )

    def append(self, delta: TokenDelta, num_bytes: int) -> None:
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.last = delta
        self.num_bytes += num_bytes

    def merged(self) -> TokenDelta:
        first, last = self.delta, self.last
        if last is None:
            return first
        return TokenDelta(
            sequence_id=first.sequence_id,
            token_ids=(*first.token_ids, *self.token_ids),
            logprobs=(*first.logprobs, *self.logprobs),
            finish_reason=last.finish_reason,
            stop_token_id=last.stop_token_id,
            num_cached_tokens=first.num_cached_tokens,
            error=last.error,
        )


class Session:
    """One gateway's queue: an asynchronous iterator of `Step`s that ends when it is closed."""

    def __init__(self, gateway_id: str, *, max_pending_bytes: int) -> None:
        self.gateway_id = gateway_id
        self.is_closed = False
        self.is_released = False  # the hub has told the node of its end
        self._max_pending_bytes = max_pending_bytes
        self._queue: list[_Pending] = []
        self._open_entries: dict[str, _Pending] = {}  # where a sequence's next tokens may join
        self._num_bytes = 0
        self._wake = asyncio.Event()
        self._serving_task: asyncio.Task[object] | None = asyncio.current_task()

    def close(self) -> None:
        """End the iteration; what waits is discarded."""
        self.is_closed = True
        self._queue.clear()
        self._open_entries.clear()
        self._num_bytes = 0
        self._wake.set()

    def drop(self) -> None:
        """Close, and interrupt the task that serves it wherever it hangs."""
        self.close()
        if self._serving_task is not None:
            self._serving_task.cancel()

    def push(self, delta: TokenDelta) -> bool:
        """Queue `delta`; False when the queue is full."""
        num_bytes = _size_of(delta)
        if self._num_bytes + num_bytes > self._max_pending_bytes:
            return False
        self._num_bytes += num_bytes
        entry = self._open_entries.get(delta.sequence_id)
        if entry is not None and entry.accepts(delta, num_bytes):
            entry.append(delta, num_bytes)
        else:
            entry = _Pending(delta, num_bytes)
            self._queue.append(entry)
            self._open_entries[delta.sequence_id] = entry
        ends = delta.finish_reason is not None or delta.error is not None
        if ends or delta.started or delta.handed_off:
            del self._open_entries[delta.sequence_id]
        self._wake.set()
        return True

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> pb.Step:
        while not self._queue and not self.is_closed:
            self._wake.clear()
            await self._wake.wait()
        if self.is_closed:
            raise StopAsyncIteration
        return self._take_frame()

    def _take_frame(self) -> pb.Step:
        count, num_bytes = 0, 0
        for entry in self._queue:
            if count and num_bytes + entry.num_bytes > MAX_FRAME_BYTES:
                break
            count += 1
            num_bytes += entry.num_bytes
        taken, self._queue = self._queue[:count], self._queue[count:]
        for entry in taken:
            if self._open_entries.get(entry.delta.sequence_id) is entry:
                del self._open_entries[entry.delta.sequence_id]
        self._num_bytes -= num_bytes
        return pb.Step(deltas=[encode_delta(entry.merged()) for entry in taken])


class SessionHub:
    """The sessions of a node, by gateway. `on_drop` hears which gateway was too slow."""

    def __init__(
        self,
        *,
        max_pending_bytes: int = MAX_PENDING_BYTES,
        on_drop: Callable[[str], None] | None = None,
    ) -> None:
        self._max_pending_bytes = max_pending_bytes
        self._on_drop = on_drop
        self._sessions: dict[str, Session] = {}

    def open(self, gateway_id: str) -> Session:
        """A session served by the current task; `NodeUnavailable` while an older one ends."""
        older = self._sessions.get(gateway_id)
        if older is not None:
            older.drop()
            raise NodeUnavailable(
                "An older session of this gateway is being closed; connect again.",
                reason="session_replaced",
                retry_after_seconds=1.0,
            )
        session = Session(gateway_id, max_pending_bytes=self._max_pending_bytes)
        self._sessions[gateway_id] = session
        return session

    def close(self, session: Session) -> bool:
        """End the session; True the first time: then the node ends what ran for its gateway."""
        session.close()
        if session.is_released:
            return False
        session.is_released = True
        del self._sessions[session.gateway_id]
        return True

    def publish(self, gateway_id: str, deltas: Sequence[TokenDelta]) -> None:
        """Queue deltas for a gateway. For one that is not connected they are dropped."""
        session = self._sessions.get(gateway_id)
        if session is None or session.is_closed:
            return
        for delta in deltas:
            if delta.error is not None:
                _log_error(delta.sequence_id, delta.error)
            if not session.push(delta):
                session.drop()
                if self._on_drop is not None:
                    self._on_drop(gateway_id)
                return

    def is_open(self, gateway_id: str) -> bool:
        session = self._sessions.get(gateway_id)
        return session is not None and not session.is_closed

    def close_all(self) -> None:
        """End every iteration, for an orderly exit."""
        for session in self._sessions.values():
            session.close()


def _log_error(sequence_id: str, error: ServingError) -> None:
    """The gateway's log has the request that the sequence belongs to."""
    facts = {"sequence_id": sequence_id, "error": error.code, "reason": error.reason}
    logger.info("a sequence ended in an error", extra=facts)


def _size_of(delta: TokenDelta) -> int:
    """About how many bytes it takes on the wire, from above."""
    size = _DELTA_BYTES + len(delta.sequence_id) + _TOKEN_BYTES * len(delta.token_ids)
    for entry in delta.logprobs:
        size += _LOGPROB_BYTES * (2 + len(entry.top))
    if delta.error is not None:
        size += 4 * len(delta.error.message)
    return size
