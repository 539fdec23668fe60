"""The frames that one peer is sent: planned, packed and posted, several at a time.

Life of a frame
    1. There is a slot for it, so the oldest transfer that has something to ship plans it.
    2. It is packed, with its digests (`payloads.py` has the ways).
    3. If its transfer may still post: header and payload go out. Else it is dropped.
    4. Nobody reads header, slot or blocks any more, for good reasons or bad: the slot is free, the
       transfer is told.
    A frame that cannot be packed fails its transfer at once, and is dropped when the device has
    ended what was begun of it. Or the device does not answer: then it never ends, and the
    connection is given up.

Frames are driven by callbacks of the moves and sends themselves: a task for each would take longer
than the wire does.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from cluster.errors import ServingError
from cluster.failpoints import failpoint
from cluster.isolation import tried
from kv_transfer.digests import PlaceSeal
from kv_transfer.failures import FailureReason, failure
from kv_transfer.frame_place import FramePlace
from kv_transfer.protocol import (
    COMMIT_BYTES,
    CommitMessage,
    FrameHeader,
    pack_commit,
    pack_header,
    write_header,
)
from kv_transfer.sending.payloads import PiecesPayload, ReadPayload, SlotPayload
from kv_transfer.sending.slot_reads import SlotReads
from kv_transfer.small_messages import SmallMessages
from kv_transfer.trace import TRACE

if TYPE_CHECKING:
    from collections.abc import Callable

    from kv_transfer.agent import TransferAgent
    from kv_transfer.protocol import FrameLimits
    from kv_transfer.sending.data_link import DataLink
    from kv_transfer.sending.outgoing import FramePlan, Instruction
    from kv_transfer.sending.payloads import Payload
    from kv_transfer.staging import StagingSlot

logger = logging.getLogger(__name__)

FIRST_FRAME_BYTES = 32 << 20  # packed in a quarter of the time that a full slot takes


class Shipper(Protocol):
    """Who decides what is shipped to this peer, and owns the slots for it."""

    def __hash__(self) -> int: ...

    def next_shipment(self) -> Any: ...
    def may_post(self, shipment: Any) -> bool: ...
    def did(self, shipment: Any, instructions: list[Instruction]) -> None: ...


@dataclass(frozen=True, slots=True)
class _Frame:
    shipment: Any
    plan: FramePlan
    slot: StagingSlot
    payload: Payload

    def mark(self, point: str) -> None:
        TRACE.mark(point, self.plan.layer_start, self.plan.positions[0])


class Shipping:
    """One per pairing."""

    def __init__(
        self, agent: TransferAgent, link: DataLink, shipper: Shipper, cut: Callable[[], None]
    ) -> None:
        """`cut` ends the connection."""
        self._agent = agent
        self._link = link
        self._shipper = shipper
        self._cut = cut
        self._has_work = asyncio.Event()
        self._is_stopped = False
        self.num_posted = 0  # headers and commits
        self._num_on_their_way = 0  # frames, from their packing on
        self._size = 0  # of the next one, in units
        self._packing: set[asyncio.Future[Any]] = set()
        self._failing: set[asyncio.Task[None]] = set()  # what could not be packed, until it is over
        self._may_pack_on = False  # something of it, and nobody can say until when
        self._messages = link.messages or SmallMessages(
            link.endpoint, link.session_id, COMMIT_BYTES
        )
        self._reads = SlotReads(link.messages, cut) if link.messages is not None else None
        self._pumping = asyncio.create_task(self._pump())
        self._pumping.add_done_callback(self._pumped)

    def wake(self) -> None:
        """A transfer may have a frame to ship: one is packed at once, where there is a slot."""
        if self._has_work.is_set() or self._is_stopped:
            return
        try:
            slot = self._agent.staging.take(self._shipper)
            shipment = self._ship(slot) if slot is not None else None
            if slot is None or (shipment is not None and shipment.machine.has_frame):
                self._has_work.set()  # the rest, one a round
        except Exception as error:  # whoever wakes us has others to care for
            self._give_up(error)

    def commit(self, commit: CommitMessage) -> None:
        """Behind the headers of all its frames. Should it not arrive, the link is lost."""
        self.num_posted += 1
        self._messages.send(pack_commit(commit))
        if TRACE.is_on:
            TRACE.mark("s.commit")

    async def stop(self) -> bool:
        """Plan no more frames, and wait until those that are packed were dropped or posted. False
        when some of them may still touch slots and blocks."""
        self._is_stopped = True
        self._pumping.cancel()
        await asyncio.gather(self._pumping, *self._packing, return_exceptions=True)
        if self._failing:
            await asyncio.wait(self._failing)
        return not self._may_pack_on

    async def _pump(self) -> None:
        while True:
            await self._has_work.wait()
            if self._ship(await self._agent.staging.acquire(self._shipper)) is None:
                self._has_work.clear()
            await asyncio.sleep(0)  # what is packed meanwhile goes out before more is packed

    def _pumped(self, pumping: asyncio.Task[None]) -> None:
        if not pumping.cancelled():
            self._give_up(pumping.exception())

    def _give_up(self, error: BaseException | None) -> None:
        logger.error("frames cannot be planned any more", exc_info=error)
        self._cut()  # nothing is ever sent again

    def _ship(self, slot: StagingSlot) -> Any:
        """Pack a frame into it. Whose it is; None when there is none."""
        shipment, plan = None, None
        try:
            shipment = self._shipper.next_shipment()
            if shipment is not None:
                plan = shipment.machine.next_frame(self._next_size())
        finally:
            if plan is None:
                self._agent.staging.release(slot)
        if plan is None:
            return None
        self._pack(shipment, plan, slot)
        return shipment

    def _next_size(self) -> int:
        """Units of the next frame at the most. A reader has nothing to do until the first is
        packed, so that is small; the next is packed while it reads one half as large."""
        limits = self._link.limits
        if self._reads is None:
            return limits.max_units
        if not self._num_on_their_way:
            self._size = max(1, FIRST_FRAME_BYTES // limits.unit_bytes)
        size = min(self._size, limits.max_units)
        self._size = 2 * size
        return size

    def _pack(self, shipment: Any, plan: FramePlan, slot: StagingSlot) -> None:
        if TRACE.is_on:
            TRACE.mark("s.slot", plan.layer_start, plan.positions[0])
        self._num_on_their_way += 1
        payload = tried(partial(self._begin, shipment, plan, slot))
        if isinstance(payload, Exception):
            self._fail(shipment, slot, payload)
            return
        frame = _Frame(shipment, plan, slot, payload)
        if TRACE.is_on:
            frame.mark("s.gather_queued")
        self._packing.add(payload.packed)
        payload.packed.add_done_callback(lambda done: self._packed(frame, done))

    def _begin(self, shipment: Any, plan: FramePlan, slot: StagingSlot) -> Payload:
        link = self._link
        seal = PlaceSeal(shipment.digest_seed, plan.layer_start, plan.num_layers, plan.positions)
        frame = FramePlace(seal, plan.block_ids, plan.table)
        if link.pieces is not None:
            return PiecesPayload(self._agent, link.pieces, frame)
        if self._reads is not None:
            return ReadPayload(self._agent, link, self._reads, slot, frame, plan.after)
        return SlotPayload(self._agent, link, slot, frame, plan.after)

    def _packed(self, frame: _Frame, packing: asyncio.Future[Any]) -> None:
        self._packing.discard(packing)
        if TRACE.is_on:
            frame.mark("s.gathered")
        error = packing.exception()
        if error is not None:
            self._fail(frame.shipment, frame.slot, error)
        elif not self._shipper.may_post(frame.shipment):
            self._drop(frame.shipment, frame.slot)
        else:
            self._post(frame)

    def _drop(self, shipment: Any, slot: StagingSlot) -> None:
        self._num_on_their_way -= 1
        self._agent.staging.release(slot)
        self._shipper.did(shipment, shipment.machine.dropped())

    def _fail(self, shipment: Any, slot: StagingSlot, error: BaseException) -> None:
        logger.error("blocks could not be packed", exc_info=error)
        told = failure(FailureReason.INTERNAL)
        failing = asyncio.create_task(self._drop_when_settled(shipment, slot))
        self._failing.add(failing)
        failing.add_done_callback(self._failing.discard)
        self._shipper.did(shipment, shipment.machine.failed(told))

    async def _drop_when_settled(self, shipment: Any, slot: StagingSlot) -> None:
        """It may be packed in part: its blocks are still read, its slot is still written."""
        if await self._agent.settled():
            self._drop(shipment, slot)
        else:
            self._may_pack_on = True
            self._cut()

    def _post(self, frame: _Frame) -> None:
        seq, instructions = frame.shipment.machine.posted()
        began = time.perf_counter()
        sends = self._send(frame, _header_of(frame, seq, self._link.limits))
        num_left = len(sends)

        def ended(_: asyncio.Future[None]) -> None:
            nonlocal num_left
            num_left -= 1
            if num_left == 0:
                errors = [send.exception() for send in sends]
                self._sent(frame, next(filter(None, errors), None), began)

        for send in sends:
            send.add_done_callback(ended)
        if TRACE.is_on:
            frame.mark("s.posted")
        self._shipper.did(frame.shipment, instructions)
        failpoint("prefill.after_frame")

    def _send(self, frame: _Frame, header: FrameHeader) -> list[asyncio.Future[None]]:
        """Header and payload, as far as they could be posted: a peer that got half of a frame gets
        nothing more. What is to be waited for before slot and blocks are touched again."""
        link, buffer = self._link, frame.slot.header
        sends: list[asyncio.Future[None]] = []
        try:
            if link.messages is not None:
                link.messages.send(pack_header(header))
            else:
                header_bytes = write_header(header, buffer.numpy().data)
                sends.append(link.endpoint.send(buffer[:header_bytes], link.session_id))
            self.num_posted += 1
            sends.append(frame.payload.send(header.payload_bytes, header.nonce))
        except Exception:
            logger.exception("a frame could not be posted")
            refused: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            refused.set_exception(failure(FailureReason.INTERNAL))
            sends.append(refused)
            self._cut()
        return sends

    def _sent(self, frame: _Frame, broken: BaseException | None, began: float) -> None:
        if TRACE.is_on:
            frame.mark("s.sent")
        self._num_on_their_way -= 1
        self._agent.staging.release(frame.slot)
        error: ServingError | None = None
        if broken is not None:
            error = broken if isinstance(broken, ServingError) else None
            error = error or failure(FailureReason.LINK_LOST)
        else:
            spent = time.perf_counter() - began
            kv_bytes = frame.plan.num_units * self._link.limits.unit_bytes
            self._agent.stats.moved(self._link.transport_name, kv_bytes, spent)
        self._shipper.did(frame.shipment, frame.shipment.machine.settled(error))


def _header_of(frame: _Frame, seq: int, limits: FrameLimits) -> FrameHeader:
    plan, ticket = frame.plan, frame.shipment.machine.ticket
    return FrameHeader(
        transfer_id=frame.shipment.transfer_id,
        incarnation=ticket.incarnation,
        epoch=ticket.epoch,
        nonce=ticket.nonce,
        seq=seq,
        layer_start=plan.layer_start,
        num_layers=plan.num_layers,
        positions=plan.positions,
        payload_bytes=limits.payload_bytes(plan.num_units),
        slot=frame.payload.read_from,
    )
