"""One prefill node's connection as the receiver sees it: control messages out, frames in.

Life of a session
    1. Opened by a hello that fits; its id is told to the peer.
    2. The peer connects its data endpoint with that id: headers are received one by one, each
       payload into a slot, or into scratch memory when it is not wanted.
    3. Ended by either side: `revoke` cuts the data endpoint and waits until every receive and
       every scatter of the session is over.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from cluster.errors import ServingError
from cluster.failpoints import failpoint
from kv_transfer.digests import DigestKind, PlaceSeal
from kv_transfer.failures import FailureReason, failure
from kv_transfer.protocol import FrameHeader, FrameMalformed, parse_header
from kv_transfer.receiving.intake_instructions import Dropping, Landing

if TYPE_CHECKING:
    from cluster.node import NodeId
    from kv_transfer.agent import TransferAgent
    from kv_transfer.receiving.intake_instructions import Instruction
    from kv_transfer.staging import StagingSlot
    from kv_transfer.transports.base import Endpoint

logger = logging.getLogger(__name__)


class FrameEvents(Protocol):
    """Who decides about frames."""

    def frame_arrived(self, session_id: int, header: FrameHeader) -> Landing | Dropping: ...
    def may_scatter(self, transfer_id: bytes) -> bool: ...
    def frame_ended(
        self, transfer_id: bytes, error: ServingError | None, verified: FrameHeader | None
    ) -> None: ...
    def link_lost(self, session_id: int, reason: FailureReason) -> None: ...


class ReceiverSession:
    def __init__(
        self, session_id: int, peer: NodeId, agent: TransferAgent, events: FrameEvents
    ) -> None:
        self.id = session_id
        self.peer = peer
        self.digest_kind = DigestKind.MULTIPLY_SHIFT  # until the hellos agree on another
        self.outbox: asyncio.Queue[Instruction | None] = asyncio.Queue()
        self._agent = agent
        self._events = events
        self._endpoint: Endpoint | None = None
        self._transport_name = ""
        self._is_closed = False
        self._receiving: asyncio.Task[None] | None = None
        self._frames: set[asyncio.Task[None]] = set()

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
        return True

    # ---- frames ---------------------------------------------------------------------------

    async def _receive(self, endpoint: Endpoint) -> None:
        """Receive headers, in order, until the connection ends."""
        limits = self._agent.limits
        buffer = torch.zeros(limits.max_header_bytes, dtype=torch.uint8)
        view = buffer.numpy().data
        try:
            while True:
                await endpoint.recv(buffer, self.id)
                await self._take(endpoint, parse_header(view, limits))
        except FrameMalformed as error:
            logger.warning("frames of %s cannot be read: %s", self.peer.name, error.message)
            self._events.link_lost(self.id, FailureReason.FRAME_MALFORMED)
        except ServingError:
            self._events.link_lost(self.id, FailureReason.LINK_LOST)
        except Exception:
            logger.exception("frames of %s are not received any more", self.peer.name)
            self._events.link_lost(self.id, FailureReason.UNKNOWN)

    async def _take(self, endpoint: Endpoint, header: FrameHeader) -> None:
        """Post the receive of one payload; payloads are posted in the order of their headers."""
        failpoint("decode.on_frame")
        fate = self._events.frame_arrived(self.id, header)
        if isinstance(fate, Dropping):
            self._agent.stats.frames_dropped[fate.reason.value] += 1
            received = endpoint.recv(
                self._agent.staging.scratch[: header.payload_bytes], header.nonce
            )
            self._spawn(self._drop(fate, received))
            return
        try:
            slot = await self._agent.staging.acquire(self.id)
        except asyncio.CancelledError:
            self._events.frame_ended(header.transfer_id, failure(FailureReason.LINK_LOST), None)
            raise
        received = endpoint.recv(slot.payload[: header.payload_bytes], header.nonce)
        self._spawn(self._land(header, fate, slot, received))

    async def _drop(self, fate: Dropping, received: asyncio.Future[None]) -> None:
        await asyncio.wait([received])
        received.exception()  # looked at, so that it is not reported as lost
        if fate.is_counted:
            self._events.frame_ended(fate.transfer_id, failure(fate.reason), None)

    async def _land(
        self,
        header: FrameHeader,
        landing: Landing,
        slot: StagingSlot,
        received: asyncio.Future[None],
    ) -> None:
        began = time.perf_counter()
        try:
            error = await self._verify(header, landing, slot, received)
        except Exception:
            logger.exception("a frame of %s could not be placed", self.peer.name)
            error = failure(FailureReason.UNKNOWN)
            await self._agent.pool.settle()
        finally:
            self._agent.staging.release(slot)
        if error is None:
            spent = time.perf_counter() - began
            self._agent.stats.moved(self._transport_name, header.payload_bytes, spent)
        self._events.frame_ended(header.transfer_id, error, header if error is None else None)

    async def _verify(
        self,
        header: FrameHeader,
        landing: Landing,
        slot: StagingSlot,
        received: asyncio.Future[None],
    ) -> ServingError | None:
        """Receive the payload, compare its digests and scatter it; why not, otherwise."""
        try:
            await received
        except ServingError as error:
            await self._agent.pool.settle()
            return error
        if not (self._events.may_scatter(header.transfer_id) and self._agent.staging.owns(slot)):
            return failure(FailureReason.ABORTED)
        pool = self._agent.pool
        seal = PlaceSeal(
            seed=landing.digest_seed,
            layer_start=header.layer_start,
            num_layers=header.num_layers,
            positions=header.positions,
        )
        scattering = pool.begin_scatter(
            slot.payload,
            layer_start=header.layer_start,
            num_layers=header.num_layers,
            block_ids=landing.block_ids,
            accepts=lambda digests: np.array_equal(seal.seal(digests), header.digests),
            digest=self.digest_kind,
        )
        seal.prepare()
        is_right = await pool.end(scattering)
        if is_right:
            return None
        if self._agent.stats.corrupt(self.peer.name):
            logger.error(
                "prefill node %s has sent corrupt KV again and again: look at its memory and links",
                self.peer.name,
            )
        return failure(FailureReason.DIGEST_MISMATCH)

    def _spawn(self, work: Any) -> None:
        frame = asyncio.create_task(work)
        self._frames.add(frame)
        frame.add_done_callback(self._frames.discard)
