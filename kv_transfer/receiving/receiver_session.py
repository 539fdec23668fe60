"""One prefill node's connection as the receiver sees it: control messages out, frames in.

Life of a session
    1. Opened by a hello that fits; its id is told to the peer.
    2. The peer connects its data endpoint with that id: headers are received one by one, each
       payload by one of the ways of `arrivals.py`, or into scratch memory when it is not wanted.
       If its slots are mapped here, it connects for messages too, and headers come by these.
    3. Ended by either side: `revoke` cuts the data endpoint and waits until everything that
       receives, reads or writes for the session is over.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol

import torch

from cluster.errors import ServingError
from cluster.failpoints import failpoint
from kv_transfer.digests import DigestKind, PlaceSeal
from kv_transfer.failures import FailureReason, failure
from kv_transfer.frame_place import FramePlace
from kv_transfer.protocol import CommitMessage, FrameHeader, FrameMalformed, parse_message
from kv_transfer.receiving.arrivals import PiecesArrival, ReadArrival, SlotArrival
from kv_transfer.receiving.intake_instructions import Dropping, Landing
from kv_transfer.receiving.landings import Landings
from kv_transfer.receiving.silence import Silence
from kv_transfer.receiving.slot_reader import SlotReader
from kv_transfer.trace import TRACE

if TYPE_CHECKING:
    from cluster.node import NodeId
    from kv_transfer.agent import TransferAgent
    from kv_transfer.receiving.arrivals import ReceivedArrival
    from kv_transfer.receiving.intake_instructions import Instruction
    from kv_transfer.receiving.paced_reads import PacedReads
    from kv_transfer.transports.base import Endpoint, PieceEndpoint
    from kv_transfer.transports.local_messages import LocalMessages

logger = logging.getLogger(__name__)

# A header may take a round trip of its own; those of the next frames need not wait for it.
_HEADERS_AHEAD = 4
# Payloads that nobody wants and that have not come: each takes memory here until it does. A sender
# has far fewer slots to send from.
MAX_DRAINING = 1024
# Control messages that the peer has left unread, far more than it ever has transfers.
MAX_UNREAD = 16_384
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
        self._endpoint: Endpoint | None = None
        self._pieces: PieceEndpoint | None = None  # it, if payloads go straight into blocks
        self._messages: LocalMessages | None = None
        self._is_closed = False
        self._serving_task: asyncio.Task[object] | None = asyncio.current_task()
        self._receiving: asyncio.Task[None] | None = None
        self._num_draining = 0
        self._silence = Silence()
        self._is_taking = False  # a payload; the next header waits for us
        self._landings = Landings(agent, events, reads, peer.name, self._give_up)

    @property
    def is_connected(self) -> bool:
        return self._endpoint is not None

    @property
    def transport_name(self) -> str:
        """What carries its payloads; empty before it is connected."""
        return self._landings.transport_name

    @property
    def has_messages(self) -> bool:
        return self._messages is not None

    def told_posted(self, num_posted: int) -> None:
        """By the control stream: the peer has posted so many headers and commits."""
        self._silence.told(num_posted)

    def is_silent(self, now: float) -> bool:
        """Its data link swallows what is posted, by now for sure."""
        is_busy = self._is_taking or self._landings.is_busy
        if not self._silence.lasts(now, is_busy=is_busy):
            return False
        logger.warning("what prefill node %s posts does not arrive", self.peer.name)
        return True

    def send(self, instruction: Instruction) -> None:
        """Queue a control message; nothing once the session is closed. For a peer that reads none,
        the task that serves it ends, wherever it hangs, and the session with it."""
        if self._is_closed:
            return
        self.outbox.put_nowait(instruction)
        if self.outbox.qsize() > MAX_UNREAD and self._serving_task is not None:
            self._serving_task.cancel()
            self._serving_task = None  # once

    def connected(self, endpoint: Endpoint) -> None:
        """The data endpoint is up. Raises `TransferFailed` when its kind is refused."""
        name = self._landings.transport_name = self._agent.admit(endpoint)
        self._endpoint = endpoint
        logger.info("paired with prefill node %s over %s", self.peer.name, name)
        endpoint.on_close(self._lost)
        self._pieces = self._agent.pieces_of(endpoint, self.digest_kind)
        self._receiving = asyncio.create_task(self._receive(endpoint))
        self._receiving.add_done_callback(self._received)
        self._hear()

    def messages_connected(self, messages: LocalMessages) -> None:
        """Headers of frames that are to be read from the sender's slots, and commits, come by
        these."""
        self._messages = messages
        messages.on_close(self._lost)
        self._hear()

    def _hear(self) -> None:
        """Once both connections are there."""
        if self._endpoint is not None and self._messages is not None:
            reader = SlotReader(self.sender_slots, self._messages)
            self._messages.listen(lambda data: self._heard(data, reader))

    def _lost(self) -> None:
        self._events.link_lost(self.id, FailureReason.LINK_LOST)

    async def revoke(self) -> bool:
        """Cut the connection. True when nothing of this session can write any more."""
        self._is_closed = True
        self.outbox.put_nowait(None)
        if self._messages is not None:
            self._messages.close()
        if self._receiving is not None:
            self._receiving.cancel()
            await asyncio.wait([self._receiving])
        if self._endpoint is not None and not await self._endpoint.close():
            return False
        if not await self._landings.ended():
            return False
        if not await self._agent.settled():
            return False
        self.sender_slots.clear()  # unmapped, whoever else still knows the list
        return True

    # ---- frames ---------------------------------------------------------------------------

    async def _receive(self, endpoint: Endpoint) -> None:
        """Receive headers and commits, in order, until the connection ends."""
        limits = self._agent.limits
        posted = deque(
            self._post_header(endpoint, torch.zeros(limits.max_header_bytes, dtype=torch.uint8))
            for _ in range(_HEADERS_AHEAD)
        )
        while True:
            buffer, received = posted.popleft()
            await received
            self._silence.heard()
            message = parse_message(buffer.numpy().data, limits)
            posted.append(self._post_header(endpoint, buffer))
            if isinstance(message, CommitMessage):
                self._events.commit_arrived(self.id, message)
            else:
                self._is_taking = True
                await self._take(endpoint, message)
                self._is_taking = False
                await asyncio.sleep(0)  # what has landed meanwhile goes before what comes

    def _received(self, receiving: asyncio.Task[None]) -> None:
        if not receiving.cancelled():
            self._break(receiving.exception())

    def _heard(self, data: memoryview, reader: SlotReader) -> None:
        """A message over the local connection."""
        self._silence.heard()
        try:
            message = parse_message(data, self._agent.limits)
            if isinstance(message, CommitMessage):
                self._events.commit_arrived(self.id, message)
            else:
                self._take_mapped(reader, message)
        except Exception as error:
            self._break(error)

    def _give_up(self) -> None:
        self._events.link_lost(self.id, FailureReason.UNKNOWN)

    def _break(self, error: BaseException | None) -> None:
        reason = FailureReason.LINK_LOST
        if isinstance(error, FrameMalformed):
            logger.warning("frames of %s cannot be read: %s", self.peer.name, error.message)
            reason = FailureReason.FRAME_MALFORMED
        elif not isinstance(error, ServingError):
            logger.error("frames of %s are not received any more", self.peer.name, exc_info=error)
            reason = FailureReason.UNKNOWN
        self._events.link_lost(self.id, reason)

    def _post_header(self, endpoint: Endpoint, buffer: torch.Tensor) -> _PostedHeader:
        received = endpoint.recv(buffer, self.id)
        received.add_done_callback(_look_at)  # of those behind a broken one, nobody else does
        return buffer, received

    def _decide(self, header: FrameHeader) -> Landing | Dropping:
        """What becomes of it."""
        failpoint("decode.on_frame")
        if TRACE.is_on:
            TRACE.mark("r.header", header.layer_start, header.positions[0])
        fate = self._events.frame_arrived(self.id, header)
        if isinstance(fate, Dropping):
            self._agent.stats.frames_dropped[fate.reason.value] += 1
        return fate

    def _take_mapped(self, reader: SlotReader, header: FrameHeader) -> None:
        """Its payload is in a slot of the sender's."""
        name = reader.check(header)
        fate = self._decide(header)
        if isinstance(fate, Dropping):
            reader.done(name)
            self._dropped(fate)
        else:
            place = _place_of(header, fate)
            arrival = ReadArrival(self._agent, reader, name, place, self.digest_kind)
            self._landings.read(header, arrival, is_last=fate.is_last)

    async def _take(self, endpoint: Endpoint, header: FrameHeader) -> None:
        """Take one payload; payloads are received in the order of their headers."""
        if header.slot is not None:
            raise FrameMalformed("its slot is not mapped here")
        fate = self._decide(header)
        if isinstance(fate, Dropping):
            self._drop(fate, header, endpoint)
            return
        try:
            slot = await self._agent.staging.acquire(self.id)
        except asyncio.CancelledError:
            self._events.frame_ended(header.transfer_id, failure(FailureReason.LINK_LOST), None)
            raise
        place = _place_of(header, fate)
        arrival: ReceivedArrival
        if self._pieces is not None:
            arrival = PiecesArrival(self._agent, self._pieces, slot, header, place)
        else:
            arrival = SlotArrival(self._agent, endpoint, slot, header, place, self.digest_kind)
        self._landings.land(header, arrival)

    def _drop(self, fate: Dropping, header: FrameHeader, endpoint: Endpoint) -> None:
        """Nobody wants it. What was sent is received all the same."""
        with ExitStack() as undo:
            undo.callback(self._dropped, fate)  # without memory for it the session ends
            if self._num_draining == MAX_DRAINING:
                raise FrameMalformed("too many before it came without their payloads")
            scratch = self._agent.staging.scratch[: header.payload_bytes]
            received = endpoint.recv(scratch, header.nonce)
            undo.pop_all()
        self._num_draining += 1
        self._landings.spawn(self._drain(fate, received))

    async def _drain(self, fate: Dropping, received: asyncio.Future[None]) -> None:
        await asyncio.wait([received])
        self._num_draining -= 1
        received.exception()  # looked at, so that it is not reported as lost
        self._dropped(fate)

    def _dropped(self, fate: Dropping) -> None:
        if fate.is_counted:
            self._events.frame_ended(fate.transfer_id, failure(fate.reason), None)


def _place_of(header: FrameHeader, fate: Landing) -> FramePlace:
    seal = PlaceSeal(fate.digest_seed, header.layer_start, header.num_layers, header.positions)
    return FramePlace(seal, fate.block_ids, fate.table)


def _look_at(received: asyncio.Future[None]) -> None:
    if not received.cancelled():
        received.exception()
