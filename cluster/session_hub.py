"""Tokens of all sequences of a step, in one frame per gateway, over one stream per gateway; and
between them the node's state, when it changes.

Life of a session
    1. `open`: a gateway's stream begins. A second stream under the same id drops the first and
       is refused once: what ran for the first is ended before anything runs for the next.
    2. `publish` queues deltas; what waits for one sequence is merged. Never blocks.
    3. Iterating the session takes what has gathered, as `Step` frames small enough to send. A
       notice of the node's state (`tell`) has its place in their order: what the node refuses from
       then on is refused behind it, and who answers to it has read what was said before.
    4. A gateway that does not read lets its queue grow to the bound: the session is dropped, the
       task that serves it cancelled (it may hang in a write), and the node hears of it as of
       any end of a stream: what ran for that gateway is aborted.
    5. `close_all` is the node's own end, in order: what waits is still taken, nothing is added.

Everything here belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from cluster.delta_codec import encode_delta
from cluster.errors import NodeUnavailable
from cluster.proto import node_pb2 as pb
from cluster.request import TokenDelta
from cluster.sequence_log import SequenceLog
from cluster.state_notices import StateNotices

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cluster.clock import Clock
    from cluster.node import NodeState
    from cluster.request import TokenLogprobs

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
        """Only tokens after tokens: `started`, `handed_off` and errors keep a delta of their own.
        Of one with an error the gateway takes no tokens."""
        return (
            not (delta.started or delta.handed_off or delta.error)
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
        )


class Session:
    """One gateway's queue: an asynchronous iterator of frames that ends when it is closed."""

    def __init__(
        self, gateway_id: str, *, max_pending_bytes: int, hears_state: bool = False
    ) -> None:
        self.gateway_id = gateway_id
        self.hears_state = hears_state
        self.is_closed = False
        self.is_released = False  # the hub has told the node of its end
        self._max_pending_bytes = max_pending_bytes
        self._queue: list[_Pending] = []
        self._open_entries: dict[str, _Pending] = {}  # where a sequence's next tokens may join
        self._num_bytes = 0
        self._notice: pb.StateNotice | None = None
        self._num_before_notice = 0  # entries of the queue
        self._wake = asyncio.Event()
        self._serving_task: asyncio.Task[object] | None = asyncio.current_task()

    def close(self) -> None:
        """End the iteration; what waits is discarded."""
        self._notice = None
        self._queue.clear()
        self._open_entries.clear()
        self._num_bytes = 0
        self.finish()

    def finish(self) -> None:
        """Add nothing more; the iteration ends when what waits has been taken."""
        self.is_closed = True
        self._wake.set()

    def drop(self) -> None:
        """Close, and interrupt the task that serves it wherever it hangs."""
        self.close()
        if self._serving_task is not None:
            self._serving_task.cancel()

    def notify(self, notice: pb.StateNotice) -> None:
        """Behind all that waits, and instead of an earlier notice that does."""
        if not self.is_closed:
            self._notice = notice
            self._num_before_notice = len(self._queue)
            self._wake.set()

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

    async def __anext__(self) -> pb.NodeFrame:
        while not (self._queue or self._notice is not None or self.is_closed):
            self._wake.clear()
            await self._wake.wait()
        if self._notice is not None:
            if self._num_before_notice:
                return pb.NodeFrame(step=self._take_step(self._num_before_notice))
            notice, self._notice = self._notice, None
            return pb.NodeFrame(state_notice=notice)
        if not self._queue:
            raise StopAsyncIteration
        return pb.NodeFrame(step=self._take_step(len(self._queue)))

    def _take_step(self, most: int) -> pb.Step:
        """Of the first `most` entries, as many as fit."""
        count, num_bytes = 0, 0
        for entry in self._queue[:most]:
            if count and num_bytes + entry.num_bytes > MAX_FRAME_BYTES:
                break
            count += 1
            num_bytes += entry.num_bytes
        taken, self._queue = self._queue[:count], self._queue[count:]
        for entry in taken:
            if self._open_entries.get(entry.delta.sequence_id) is entry:
                del self._open_entries[entry.delta.sequence_id]
        self._num_bytes -= num_bytes
        self._num_before_notice = max(0, self._num_before_notice - count)
        return pb.Step(deltas=[encode_delta(entry.merged()) for entry in taken])


class SessionHub:
    """The sessions of a node, by gateway. `on_drop` hears which gateway was too slow. `log` is what
    the node says of the sequences."""

    def __init__(
        self,
        *,
        max_pending_bytes: int = MAX_PENDING_BYTES,
        on_drop: Callable[[str], None] | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._max_pending_bytes = max_pending_bytes
        self._on_drop = on_drop
        self._clock = clock
        self._sessions: dict[str, Session] = {}
        self._notices = StateNotices()
        self._notice: pb.StateNotice | None = None  # the last one
        self.log = SequenceLog()

    def open(self, gateway_id: str, *, hears_state: bool = False) -> Session:
        """A session served by the current task; `NodeUnavailable` while an older one ends. One that
        `hears_state` begins with the state that was last told."""
        older = self._sessions.get(gateway_id)
        if older is not None:
            older.drop()
            raise NodeUnavailable(
                "An older session of this gateway is being closed; connect again.",
                reason="session_replaced",
                retry_after_seconds=1.0,
            )
        session = Session(
            gateway_id, max_pending_bytes=self._max_pending_bytes, hears_state=hears_state
        )
        self._sessions[gateway_id] = session
        if hears_state:
            self._notices.opened(gateway_id, self._clock())
            if self._notice is not None:
                session.notify(self._notice)
        return session

    def close(self, session: Session) -> bool:
        """End the session; True the first time: then the node ends what ran for its gateway."""
        session.close()
        if session.is_released:
            return False
        session.is_released = True
        del self._sessions[session.gateway_id]
        self._notices.closed(session.gateway_id)
        return True

    def tell(self, state: NodeState) -> None:
        """The node's state is this now: say so to every gateway that hears it."""
        number = self._notices.told(self._clock())
        self._notice = pb.StateNotice(state=state.value, number=number)
        for session in self._sessions.values():
            if session.hears_state:
                session.notify(self._notice)

    def answered(self, gateway_id: str, answer: pb.StateAnswer) -> None:
        """What a gateway says to a notice."""
        self._notices.answered(gateway_id, answer.number, is_settled=answer.is_settled)

    @property
    def is_answered(self) -> bool:
        """No gateway is waited for: all have answered the state that was last told."""
        return self._notices.is_answered(self._clock())

    @property
    def awaited_gateways(self) -> list[str]:
        """Those that are."""
        return self._notices.awaited(self._clock())

    def publish(self, gateway_id: str, deltas: Sequence[TokenDelta]) -> None:
        """Queue deltas for a gateway. For one that is not connected they are dropped."""
        session = self._sessions.get(gateway_id)
        if session is None or session.is_closed:
            return
        for delta in deltas:
            if delta.error is not None:
                self.log.failed(delta.sequence_id, delta.error)
            if not session.push(delta):
                session.drop()
                if self._on_drop is not None:
                    self._on_drop(gateway_id)
                return

    @property
    def num_connected(self) -> int:
        """Gateways with a session here."""
        return len(self._sessions)

    def is_open(self, gateway_id: str) -> bool:
        session = self._sessions.get(gateway_id)
        return session is not None and not session.is_closed

    def close_all(self) -> None:
        """End every iteration, for an orderly exit, when what waits has been taken."""
        for session in self._sessions.values():
            session.finish()


def _size_of(delta: TokenDelta) -> int:
    """About how many bytes it takes on the wire, from above."""
    size = _DELTA_BYTES + len(delta.sequence_id) + _TOKEN_BYTES * len(delta.token_ids)
    for entry in delta.logprobs:
        size += _LOGPROB_BYTES * (2 + len(entry.top))
    if delta.error is not None:
        size += 4 * len(delta.error.message)
    return size
