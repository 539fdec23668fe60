"""The frames that one peer is sent: planned, packed and posted, several at a time.

Life of a frame
    1. There is a slot for it, so the oldest transfer that has something to ship plans it.
    2. It is packed into the slot; when that has ended, its digests are sealed.
    3. If its transfer may still post: header and payload go out. Else it is dropped.
    4. Both sends have ended, well or not: the slot is free, the transfer is told.

Frames are driven by callbacks of the moves and sends themselves: a task for each would take longer
than the wire does.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from cluster.errors import ServingError
from cluster.failpoints import failpoint
from kv_transfer.digests import DigestKind, PlaceSeal
from kv_transfer.failures import FailureReason, failure
from kv_transfer.protocol import (
    CommitMessage,
    FrameHeader,
    FrameLimits,
    pack_commit,
    pack_header,
)
from kv_transfer.trace import TRACE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kv_transfer.agent import TransferAgent
    from kv_transfer.sending.outgoing import FramePlan, Instruction
    from kv_transfer.staging import StagingSlot
    from kv_transfer.transports.base import Endpoint, Piece, PieceEndpoint

logger = logging.getLogger(__name__)


class Shipper(Protocol):
    """Who decides what is shipped to this peer, and owns the slots for it."""

    def __hash__(self) -> int: ...

    def next_shipment(self) -> Any: ...
    def may_post(self, shipment: Any) -> bool: ...
    def did(self, shipment: Any, instructions: list[Instruction]) -> None: ...


@dataclass(frozen=True, slots=True)
class DataLink:
    """Where frames go: `session_id` tags headers, `limits` are those of both ends. `pieces`: the
    endpoint again, if blocks are sent from where they are."""

    endpoint: Endpoint
    session_id: int
    transport_name: str
    limits: FrameLimits
    digest: DigestKind
    pieces: PieceEndpoint | None = None


@dataclass(frozen=True, slots=True)
class _Frame:
    shipment: Any
    plan: FramePlan
    slot: StagingSlot
    seal: PlaceSeal
    pieces: Sequence[Piece] | None  # its blocks, if they are sent from where they are

    def mark(self, point: str) -> None:
        TRACE.mark(point, self.plan.layer_start, self.plan.positions[0])


class Shipping:
    """One per pairing."""

    def __init__(self, agent: TransferAgent, link: DataLink, shipper: Shipper) -> None:
        self._agent = agent
        self._link = link
        self._shipper = shipper
        self._has_work = asyncio.Event()
        self._packing: set[asyncio.Future[NDArray[np.uint64]]] = set()
        self._pumping = asyncio.create_task(self._pump())

    def wake(self) -> None:
        """A transfer may have a frame to ship."""
        self._has_work.set()

    def commit(self, commit: CommitMessage) -> None:
        """Behind the headers of all its frames. Should it not arrive, the link is lost."""
        message = np.frombuffer(pack_commit(commit), dtype=np.uint8).copy()
        sent = self._link.endpoint.send(torch.from_numpy(message), self._link.session_id)
        sent.add_done_callback(lambda done: done.exception())  # looked at

    async def stop(self) -> None:
        """Plan no more frames, and wait until those that are packed were dropped or posted."""
        self._pumping.cancel()
        await asyncio.gather(self._pumping, *self._packing, return_exceptions=True)

    async def _pump(self) -> None:
        staging = self._agent.staging
        while True:
            await self._has_work.wait()
            slot = await staging.acquire(self._shipper)
            shipment = self._shipper.next_shipment()
            plan = None
            if shipment is not None:
                plan = shipment.machine.next_frame(self._link.limits.max_units)
            if plan is None:
                self._has_work.clear()
                staging.release(slot)
                continue
            self._pack(shipment, plan, slot)

    def _pack(self, shipment: Any, plan: FramePlan, slot: StagingSlot) -> None:
        seal = PlaceSeal(
            seed=shipment.digest_seed,
            layer_start=plan.layer_start,
            num_layers=plan.num_layers,
            positions=plan.positions,
        )
        frame = _Frame(shipment, plan, slot, seal, self._pieces_of(plan))
        if TRACE.is_on:
            frame.mark("s.slot")
        try:
            gathering = self._gather(frame)
        except Exception:
            logger.exception("blocks could not be packed")
            self._drop(frame, failure(FailureReason.INTERNAL))
            return
        if TRACE.is_on:
            frame.mark("s.gather_queued")
        self._packing.add(gathering)
        gathering.add_done_callback(lambda done: self._packed(frame, done))
        seal.prepare()

    def _pieces_of(self, plan: FramePlan) -> Sequence[Piece] | None:
        if self._link.pieces is None:
            return None
        return self._agent.pool.pieces(plan.layer_start, plan.num_layers, plan.block_ids)

    def _gather(self, frame: _Frame) -> asyncio.Future[NDArray[np.uint64]]:
        """Pieces stay where they are: only their digests are needed."""
        plan, pool = frame.plan, self._agent.pool
        if frame.pieces is not None:
            return pool.begin_digest(frame.pieces, plan.num_layers)
        return pool.begin_gather(
            frame.slot.payload,
            layer_start=plan.layer_start,
            num_layers=plan.num_layers,
            block_ids=plan.block_ids,
            after=plan.after,
            digest=self._link.digest,
        )

    def _packed(self, frame: _Frame, gathering: asyncio.Future[NDArray[np.uint64]]) -> None:
        self._packing.discard(gathering)
        if TRACE.is_on:
            frame.mark("s.gathered")
        error = gathering.exception()
        if error is not None:
            logger.error("blocks could not be packed", exc_info=error)
            self._drop(frame, failure(FailureReason.INTERNAL))
        elif not self._shipper.may_post(frame.shipment):
            self._drop(frame)
        else:
            self._post(frame, frame.seal.seal(gathering.result()))

    def _drop(self, frame: _Frame, error: ServingError | None = None) -> None:
        self._agent.staging.release(frame.slot)
        self._shipper.did(frame.shipment, frame.shipment.machine.dropped(error))

    def _post(self, frame: _Frame, digests: NDArray[np.uint64]) -> None:
        """`digests` are sealed."""
        endpoint, slot = self._link.endpoint, frame.slot
        seq, instructions = frame.shipment.machine.posted()
        payload_bytes = digests.size * self._link.limits.unit_bytes
        header = _header_of(frame, seq, payload_bytes, digests)
        header_bytes = pack_header(header, slot.header.numpy().data)
        began = time.perf_counter()
        sends = (
            endpoint.send(slot.header[:header_bytes], self._link.session_id),
            self._send_payload(frame, payload_bytes, header.nonce),
        )
        num_left = len(sends)

        def ended(_: asyncio.Future[None]) -> None:
            nonlocal num_left
            num_left -= 1
            if num_left == 0:
                errors = [send.exception() for send in sends]
                self._sent(frame, next(filter(None, errors), None), payload_bytes, began)

        for send in sends:
            send.add_done_callback(ended)
        if TRACE.is_on:
            frame.mark("s.posted")
        self._shipper.did(frame.shipment, instructions)
        failpoint("prefill.after_frame")

    def _send_payload(self, frame: _Frame, num_bytes: int, nonce: int) -> asyncio.Future[None]:
        if self._link.pieces is not None and frame.pieces is not None:
            return self._link.pieces.send_pieces(frame.pieces, nonce)
        return self._link.endpoint.send(frame.slot.payload[:num_bytes], nonce)

    def _sent(
        self, frame: _Frame, broken: BaseException | None, payload_bytes: int, began: float
    ) -> None:
        if TRACE.is_on:
            frame.mark("s.sent")
        self._agent.staging.release(frame.slot)
        error: ServingError | None = None
        if broken is not None:
            error = broken if isinstance(broken, ServingError) else None
            error = error or failure(FailureReason.LINK_LOST)
        else:
            spent = time.perf_counter() - began
            self._agent.stats.moved(self._link.transport_name, payload_bytes, spent)
        self._shipper.did(frame.shipment, frame.shipment.machine.settled(error))


def _header_of(
    frame: _Frame, seq: int, payload_bytes: int, digests: NDArray[np.uint64]
) -> FrameHeader:
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
        payload_bytes=payload_bytes,
        digests=digests,
    )
