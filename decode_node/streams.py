"""The sequences of a decode node, and what their gateways hear of them. On the event loop.

1. `open` takes a sequence and the gateway that gets its tokens; from then on its deadline counts.
2. `say_started` tells the gateway that it runs, never after its first token.
3. `deliver` sends tokens, `fail` an error. With its end, or by `close`, a sequence is forgotten:
   nothing is said of it any more.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cluster.errors import NodeLost
from cluster.request import TokenDelta
from kv_transfer.trace import TRACE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from collections.abc import Sequence as SequenceOf

    from cluster.errors import ServingError
    from cluster.request import FinishReason, SequenceRequest
    from cluster.session_hub import SessionHub
    from decode_node.recompute import RecomputeBudget

MAX_REMEMBERED = 4096


@dataclass(slots=True)
class Stream:
    """One sequence and the gateway that gets its tokens."""

    request: SequenceRequest
    gateway_id: str
    is_started: bool = False
    is_recomputing: bool = False  # what its hand-off did not bring is computed here
    is_orphaned: bool = False  # its gateway lost the prefill node and waits for our word
    began_at: float = field(default_factory=time.monotonic)
    alarm: asyncio.TimerHandle | None = None


class Remembered:
    """The last ids that ended here, oldest forgotten first."""

    def __init__(self, capacity: int = MAX_REMEMBERED) -> None:
        self._capacity = capacity
        self._ids: OrderedDict[str, None] = OrderedDict()

    def add(self, sequence_id: str) -> None:
        self._ids[sequence_id] = None
        self._ids.move_to_end(sequence_id)
        if len(self._ids) > self._capacity:
            self._ids.popitem(last=False)

    def __contains__(self, sequence_id: str) -> bool:
        return sequence_id in self._ids


class Streams:
    """`finished`: those whose last token was sent. `budget` is given back with the end of each."""

    def __init__(self, hub: SessionHub, budget: RecomputeBudget) -> None:
        self.finished = Remembered()
        self._hub = hub
        self._budget = budget
        self._streams: dict[str, Stream] = {}
        self._event_loop = asyncio.get_running_loop()

    def __len__(self) -> int:
        return len(self._streams)

    def __contains__(self, sequence_id: str) -> bool:
        return sequence_id in self._streams

    def get(self, sequence_id: str) -> Stream | None:
        return self._streams.get(sequence_id)

    def items(self) -> Iterable[tuple[str, Stream]]:
        return self._streams.items()

    def of(self, gateway_id: str) -> list[str]:
        """The sequences of a gateway."""
        return [each for each, stream in self._streams.items() if stream.gateway_id == gateway_id]

    def is_open(self, stream: Stream) -> bool:
        return self._streams.get(stream.request.sequence_id) is stream

    def open(self, stream: Stream, on_deadline: Callable[[Stream], None]) -> Stream:
        seconds = stream.request.deadline_seconds
        if seconds is not None:
            stream.alarm = self._event_loop.call_later(seconds, on_deadline, stream)
        self._streams[stream.request.sequence_id] = stream
        return stream

    def close(self, sequence_id: str) -> Stream | None:
        stream = self._streams.pop(sequence_id, None)
        self._budget.end(sequence_id)
        if stream is not None and stream.alarm is not None:
            stream.alarm.cancel()
        return stream

    def say_started(self, stream: Stream) -> None:
        started = TokenDelta(
            sequence_id=stream.request.sequence_id,
            started=True,
            recomputed=stream.is_recomputing,
        )
        self._hub.publish(stream.gateway_id, [started])

    def deliver(self, deltas: SequenceOf[TokenDelta]) -> None:
        """What a step has given. A last token or an error ends its sequence."""
        by_gateway: dict[str, list[TokenDelta]] = {}
        finished: list[tuple[Stream, FinishReason]] = []
        for delta in deltas:
            stream = self._streams.get(delta.sequence_id)
            if stream is None:
                continue
            by_gateway.setdefault(stream.gateway_id, []).append(delta)
            if stream.is_recomputing:
                self._budget.end(delta.sequence_id)
            if delta.finish_reason is not None or delta.error is not None:
                self.close(delta.sequence_id)
                self.finished.add(delta.sequence_id)
            if delta.finish_reason is not None:
                finished.append((stream, delta.finish_reason))
        for gateway_id, batch in by_gateway.items():
            self._hub.publish(gateway_id, batch)
        for stream, reason in finished:  # once the frames are on their way
            self._event_loop.call_soon(self.log_end, stream, reason.value)
        if TRACE.is_on:
            TRACE.mark("d.token")

    def log_end(self, stream: Stream, outcome: str) -> None:
        seconds = time.monotonic() - stream.began_at
        self._hub.log.ended(stream.request.sequence_id, outcome, seconds)

    def fail(self, sequence_id: str, error: ServingError) -> None:
        stream = self.close(sequence_id)
        if stream is not None:
            self.say_error(stream.gateway_id, sequence_id, error)

    def say_error(self, gateway_id: str, sequence_id: str, error: ServingError) -> None:
        self._hub.publish(gateway_id, [TokenDelta(sequence_id=sequence_id, error=error)])


def orphan_error() -> NodeLost:
    return NodeLost(
        "The prefill node was lost before it handed the request off.", reason="prefill_lost"
    )
