"""The wanted frames of one session, from their headers until nothing of them writes any more.

Life of a frame
    1. `land`: its payload is received. Or `read`: it is there already, and its turn comes.
    2. If it is still wanted, it is placed into its blocks and its digests are compared.
    3. It has ended, well or not: the intake hears of it, then its slot goes back. Or nobody can say
       when it does, as a device does not answer: it never ends, and its session is given up.

Frames are driven by callbacks: a task for each would take longer than the wire.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from cluster.errors import ServingError
from cluster.isolation import tried
from kv_transfer.failures import FailureReason, failure
from kv_transfer.trace import TRACE

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from kv_transfer.agent import TransferAgent
    from kv_transfer.protocol import FrameHeader
    from kv_transfer.receiving.arrivals import Arrival, ReceivedArrival
    from kv_transfer.receiving.paced_reads import PacedReads

logger = logging.getLogger(__name__)


class LandingEvents(Protocol):
    """Who decides about frames."""

    def may_scatter(self, transfer_id: bytes) -> bool: ...
    def frame_ended(
        self, transfer_id: bytes, error: ServingError | None, verified: FrameHeader | None
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class _Frame:
    """`ended` is done when nothing of it writes."""

    header: FrameHeader
    arrival: Arrival
    began: float
    ended: asyncio.Future[None]

    def mark(self, point: str) -> None:
        TRACE.mark(point, self.header.layer_start, self.header.positions[0])


class Landings:
    def __init__(
        self,
        agent: TransferAgent,
        events: LandingEvents,
        reads: PacedReads,
        peer_name: str,
        give_up: Callable[[], None],
    ) -> None:
        """`give_up` ends the session."""
        self._agent = agent
        self._events = events
        self._reads = reads
        self._peer_name = peer_name
        self._give_up = give_up
        self.transport_name = ""
        self._frames: set[asyncio.Future[None]] = set()
        self._may_write_on = False  # something of a frame, and nobody can say until when

    @property
    def is_busy(self) -> bool:
        """Something has begun, and not ended."""
        return bool(self._frames)

    async def ended(self) -> bool:
        """Wait for all that has begun. False when some of it may still write."""
        if self._frames:
            await asyncio.wait(self._frames)
        return not self._may_write_on

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Something else that is to be waited for."""
        frame = asyncio.create_task(work)
        self._frames.add(frame)
        frame.add_done_callback(self._frames.discard)

    def read(self, header: FrameHeader, arrival: Arrival, *, is_last: bool) -> None:
        """Begin when the pace allows it; the last layer of a prompt, if it comes alone, at once."""
        frame = self._begin(header, arrival)
        is_one_layer = header.layer_start == self._agent.pool.num_layers - 1
        self._reads.begin(
            header.transfer_id,
            header.payload_bytes,
            lambda: self._place_if_wanted(frame),
            lambda: self._end(frame, failure(FailureReason.ABORTED)),
            is_awaited=is_last and is_one_layer,
        )

    def land(self, header: FrameHeader, arrival: ReceivedArrival) -> None:
        """Receive a payload; what follows is driven by callbacks, as a task for each frame would
        take longer than the wire."""
        frame = self._begin(header, arrival)
        try:
            received = arrival.receive()
        except Exception as error:  # nor can what the peer sends behind it be told apart
            self.spawn(self._end_broken(frame, error))
            raise
        if TRACE.is_on:
            frame.mark("r.posted")
        received.add_done_callback(lambda done: self._landed(frame, done))

    def _begin(self, header: FrameHeader, arrival: Arrival) -> _Frame:
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._frames.add(ended)
        return _Frame(header, arrival, time.perf_counter(), ended)

    def _landed(self, frame: _Frame, received: asyncio.Future[None]) -> None:
        """Put it into its blocks, if it has come."""
        if TRACE.is_on:
            frame.mark("r.landed")
        broken = received.exception()
        if broken is not None:
            self.spawn(self._end_broken(frame, broken))
        else:
            self._place_if_wanted(frame)

    def _place_if_wanted(self, frame: _Frame) -> None:
        if frame.arrival.is_ours and self._events.may_scatter(frame.header.transfer_id):
            self._place(frame)
        else:
            self._end(frame, failure(FailureReason.ABORTED))

    def _place(self, frame: _Frame) -> None:
        placing = tried(frame.arrival.place)
        if isinstance(placing, Exception):
            self.spawn(self._end_broken(frame, placing))
            return
        if TRACE.is_on:
            frame.mark("r.scatter_queued")
        placing.add_done_callback(lambda done: self._scattered(frame, done))

    def _scattered(self, frame: _Frame, scattering: asyncio.Future[bool]) -> None:
        if TRACE.is_on:
            frame.mark("r.verified")
        broken = scattering.exception()
        if broken is not None:
            self.spawn(self._end_broken(frame, broken))
        elif scattering.result():
            self._end(frame, None)
        else:
            self._end_corrupt(frame)

    def _end_corrupt(self, frame: _Frame) -> None:
        """Its sender's fault, unless its transfer has ended: then the slot that was read may have
        been used again."""
        is_wanted = self._events.may_scatter(frame.header.transfer_id)
        if is_wanted and self._agent.stats.corrupt(self._peer_name):
            logger.error(
                "prefill node %s has sent corrupt KV again and again: look at its memory and links",
                self._peer_name,
            )
        self._end(frame, failure(FailureReason.DIGEST_MISMATCH))

    async def _end_broken(self, frame: _Frame, broken: BaseException) -> None:
        """Received or placed in part, maybe: nothing of it may write any more when it ends."""
        error = broken if isinstance(broken, ServingError) else failure(FailureReason.UNKNOWN)
        if broken is not error:
            logger.error("a frame of %s could not be placed", self._peer_name, exc_info=broken)
        if not await self._agent.settled():
            self._may_write_on = True
            self._forget(frame)
            self._give_up()
            return
        self._end(frame, error)

    def _end(self, frame: _Frame, error: ServingError | None) -> None:
        """A sequence may wait for it: that comes first."""
        header = frame.header
        try:
            self._events.frame_ended(header.transfer_id, error, header if error is None else None)
        finally:  # or its session could never end
            self._forget(frame)
            frame.arrival.finish()
        if error is None:
            spent = time.perf_counter() - frame.began
            kv_bytes = header.num_units * self._agent.limits.unit_bytes
            self._agent.stats.moved(self.transport_name, kv_bytes, spent)

    def _forget(self, frame: _Frame) -> None:
        """Nobody waits for it any more."""
        self._frames.discard(frame.ended)
        frame.ended.set_result(None)
