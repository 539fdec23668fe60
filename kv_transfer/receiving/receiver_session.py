"""One prefill node's connection as the receiver sees it: control messages out, frames in.

Life of a session
    1. Opened by a hello that fits; its id is told to the peer.
    2. The peer connects its data endpoint with that id: headers are received one by one, each
       payload by one of the ways of `arrivals.py`, or into scratch memory when it is not wanted.
    3. Ended by either side: `revoke` cuts the data endpoint and waits until everything that
       receives, reads or writes for the session is over.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from cluster.errors import ServingError
from cluster.failpoints import failpoint
from kv_transfer.digests import DigestKind, PlaceSeal
from kv_transfer.failures import FailureReason, failure
from kv_transfer.frame_place import FramePlace
from kv_transfer.protocol import CommitMessage, FrameHeader, FrameMalformed, parse_message
from kv_transfer.receiving.arrivals import PiecesArrival, ReadArrival, SlotArrival
from kv_transfer.receiving.intake_instructions import Dropping, Landing
from kv_transfer.receiving.slot_reader import SlotReader
from kv_transfer.trace import TRACE

if TYPE_CHECKING:
    from cluster.node import NodeId
    from kv_transfer.agent import TransferAgent
    from kv_transfer.receiving.arrivals import Arrival, ReceivedArrival
    from kv_transfer.receiving.intake_instructions import Instruction
    from kv_transfer.receiving.paced_reads import PacedReads
    from kv_transfer.transports.base import Endpoint, PieceEndpoint

logger = logging.getLogger(__name__)

# A header may take a round trip of its own; those of the next frames need not wait for it.
_HEADERS_AHEAD = 4
_PostedHeader = tuple[torch.Tensor, "asyncio.Future[None]"]


class FrameEvents(Protocol):
    """Who decides about frames."""

    def frame_arrived(self, session_id: int, header: FrameHeader) -> Landing | Dropping: ...
    def may_scatter(self, transfer_id: bytes) -> bool: ...
    def commit_arrived(self, session_id: int, commit: CommitMessage) -> None: ...
    def frame_ended(
        self, transfer_id: bytes, error: ServingError | None, verified: FrameHeader | None
    ) -> None: ...
    def link_lost(self, session_id: int, reason: FailureReason) -> None: ...


@dataclass(frozen=True, slots=True)
class _Frame:
    """A wanted frame on its way into blocks. `ended` is done when nothing of it writes."""

    header: FrameHeader
    arrival: Arrival
    began: float
    ended: asyncio.Future[None]

    def mark(self, point: str) -> None:
        TRACE.mark(point, self.header.layer_start, self.header.positions[0])


class ReceiverSession:
    def __init__(
        self,
        session_id: int,
        peer: NodeId,
        agent: TransferAgent,
        events: FrameEvents,
        reads: PacedReads,
    ) -> None:
        self.id = session_id
        self.peer = peer
        self.digest_kind = DigestKind.MULTIPLY_SHIFT  # until the hellos agree on another
        self.sender_slots: list[torch.Tensor] = []  # if they are mapped here
        self.outbox: asyncio.Queue[Instruction | None] = asyncio.Queue()
        self._agent = agent
        self._events = events
        self._reads = reads
        self._endpoint: Endpoint | None = None
        self._pieces: PieceEndpoint | None = None  # it, if payloads go straight into blocks
        self._transport_name = ""
        self._is_closed = False
        self._receiving: asyncio.Task[None] | None = None
        self._frames: set[asyncio.Future[None]] = set()

    @property
    def is_connected(self) -> bool:
        return self._endpoint is not None

    def send(self, instruction: Instruction) -> None:
        """Queue a control message; nothing once the session is closed."""
        if not self._is_closed:
            self.outbox.put_nowait(instruction)

    def connected(self, endpoint: Endpoint) -> None:
        """The data endpoint is up. Raises `TransferFailed` when its kind is refused."""
        self._transport_name = self._agent.admit(endpoint)
        self._endpoint = endpoint
        logger.info("paired with prefill node %s over %s", self.peer.name, self._transport_name)
        endpoint.on_close(lambda: self._events.link_lost(self.id, FailureReason.LINK_LOST))
        self._pieces = self._agent.pieces_of(endpoint, self.digest_kind)
        self._receiving = asyncio.create_task(self._receive(endpoint))

    async def revoke(self) -> bool:
        """Cut the connection. True when nothing of this session can write any more."""
        self._is_closed = True
        self.outbox.put_nowait(None)
        if self._receiving is not None:
            self._receiving.cancel()
            await asyncio.wait([self._receiving])
        if self._endpoint is not None and not await self._endpoint.close():
            return False
        if self._frames:
            await asyncio.wait(self._frames)
        await self._agent.pool.settle()
        self.sender_slots.clear()  # unmapped, whoever else still knows the list
        return True

    # ---- frames ---------------------------------------------------------------------------

    async def _receive(self, endpoint: Endpoint) -> None:
        """Receive headers and commits, in order, until the connection ends."""
        limits = self._agent.limits
        reader = SlotReader(self.sender_slots, endpoint, self.id)
        posted = deque(
            self._post_header(endpoint, torch.zeros(limits.max_header_bytes, dtype=torch.uint8))
            for _ in range(_HEADERS_AHEAD)
        )
        try:
            while True:
                buffer, received = posted.popleft()
                await received
                message = parse_message(buffer.numpy().data, limits)
                posted.append(self._post_header(endpoint, buffer))
                if isinstance(message, CommitMessage):
                    self._events.commit_arrived(self.id, message)
                else:
                    await self._take(endpoint, reader, message)
                    await asyncio.sleep(0)  # what has landed meanwhile goes before what comes
        except FrameMalformed as error:
            logger.warning("frames of %s cannot be read: %s", self.peer.name, error.message)
            self._events.link_lost(self.id, FailureReason.FRAME_MALFORMED)
        except ServingError:
            self._events.link_lost(self.id, FailureReason.LINK_LOST)
        except Exception:
            logger.exception("frames of %s are not received any more", self.peer.name)
            self._events.link_lost(self.id, FailureReason.UNKNOWN)

    def _post_header(self, endpoint: Endpoint, buffer: torch.Tensor) -> _PostedHeader:
        received = endpoint.recv(buffer, self.id)
        received.add_done_callback(_look_at)  # of those behind a broken one, nobody else does
        return buffer, received

    async def _take(self, endpoint: Endpoint, reader: SlotReader, header: FrameHeader) -> None:
        """Take one payload; payloads are received in the order of their headers."""
        failpoint("decode.on_frame")
        if TRACE.is_on:
            TRACE.mark("r.header", header.layer_start, header.positions[0])
        if header.slot is not None:
            reader.check(header.slot, header.payload_bytes)
        fate = self._events.frame_arrived(self.id, header)
        if isinstance(fate, Dropping):
            self._agent.stats.frames_dropped[fate.reason.value] += 1
            self._drop(fate, header, endpoint, reader)
            return
        seal = PlaceSeal(fate.digest_seed, header.layer_start, header.num_layers, header.positions)
        place, kind = FramePlace(seal, fate.block_ids), self.digest_kind
        if header.slot is not None:
            arrival = ReadArrival(self._agent, reader, header.slot, place, kind)
            self._read(header, arrival, is_last=fate.is_last)
            return
        try:
            slot = await self._agent.staging.acquire(self.id)
        except asyncio.CancelledError:
            self._events.frame_ended(header.transfer_id, failure(FailureReason.LINK_LOST), None)
            raise
        if self._pieces is not None:
            self._land(header, PiecesArrival(self._agent, self._pieces, slot, header, place))
        else:
            self._land(header, SlotArrival(self._agent, endpoint, slot, header, place, kind))

    def _drop(
        self, fate: Dropping, header: FrameHeader, endpoint: Endpoint, reader: SlotReader
    ) -> None:
        """Nobody wants it. What was sent is received all the same."""
        if header.slot is not None:
            reader.done(header.slot)
            self._dropped(fate)
            return
        with ExitStack() as undo:
            undo.callback(self._dropped, fate)  # without memory for it the session ends
            scratch = self._agent.staging.scratch[: header.payload_bytes]
            received = endpoint.recv(scratch, header.nonce)
            undo.pop_all()
        self._spawn(self._drain(fate, received))

    async def _drain(self, fate: Dropping, received: asyncio.Future[None]) -> None:
        await asyncio.wait([received])
        received.exception()  # looked at, so that it is not reported as lost
        self._dropped(fate)

    def _dropped(self, fate: Dropping) -> None:
        if fate.is_counted:
            self._events.frame_ended(fate.transfer_id, failure(fate.reason), None)

    def _read(self, header: FrameHeader, arrival: Arrival, *, is_last: bool) -> None:
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

    def _land(self, header: FrameHeader, arrival: ReceivedArrival) -> None:
        """Receive a payload; what follows is driven by callbacks, as a task for each frame would
        take longer than the wire."""
        frame = self._begin(header, arrival)
        try:
            received = arrival.receive()
        except Exception as error:  # nor can what the peer sends behind it be told apart
            self._spawn(self._end_broken(frame, error))
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
            self._spawn(self._end_broken(frame, broken))
        else:
            self._place_if_wanted(frame)

    def _place_if_wanted(self, frame: _Frame) -> None:
        if frame.arrival.is_ours and self._events.may_scatter(frame.header.transfer_id):
            self._place(frame)
        else:
            self._end(frame, failure(FailureReason.ABORTED))

    def _place(self, frame: _Frame) -> None:
        try:
            placing = frame.arrival.place()
        except Exception as error:
            self._spawn(self._end_broken(frame, error))
            return
        if TRACE.is_on:
            frame.mark("r.scatter_queued")
        placing.add_done_callback(lambda done: self._scattered(frame, done))

    def _scattered(self, frame: _Frame, scattering: asyncio.Future[bool]) -> None:
        if TRACE.is_on:
            frame.mark("r.verified")
        broken = scattering.exception()
        if broken is not None:
            self._spawn(self._end_broken(frame, broken))
        elif scattering.result():
            self._end(frame, None)
        else:
            if self._agent.stats.corrupt(self.peer.name):
                logger.error(
                    "prefill node %s has sent corrupt KV again and again: look at its memory "
                    "and links",
                    self.peer.name,
                )
            self._end(frame, failure(FailureReason.DIGEST_MISMATCH))

    async def _end_broken(self, frame: _Frame, broken: BaseException) -> None:
        """Received or placed in part, maybe: nothing of it may write any more when it ends."""
        error = broken if isinstance(broken, ServingError) else failure(FailureReason.UNKNOWN)
        if broken is not error:
            logger.error("a frame of %s could not be placed", self.peer.name, exc_info=broken)
        await self._agent.pool.settle()
        self._end(frame, error)

    def _end(self, frame: _Frame, error: ServingError | None) -> None:
        header = frame.header
        frame.arrival.finish()
        if error is None:
            spent = time.perf_counter() - frame.began
            kv_bytes = header.num_units * self._agent.limits.unit_bytes
            self._agent.stats.moved(self._transport_name, kv_bytes, spent)
        self._events.frame_ended(header.transfer_id, error, header if error is None else None)
        self._frames.discard(frame.ended)
        frame.ended.set_result(None)

    def _spawn(self, work: Any) -> None:
        frame = asyncio.create_task(work)
        self._frames.add(frame)
        frame.add_done_callback(self._frames.discard)


def _look_at(received: asyncio.Future[None]) -> None:
    if not received.cancelled():
        received.exception()
