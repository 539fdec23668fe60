"""One decode node as the sender sees it: the pairing, and the pump that ships frames to it.

Life of a peer
    1. CONNECTING   control stream, then data endpoint. Transfers may wait meanwhile.
    2. READY        messages go both ways; the pump packs and posts frames of the transfers
                    that have some, in the order they were opened.
    3. LOST         the stream or the endpoint ended, or pairing failed. The transfers are
                    told, the endpoint is closed, and what was posted ends. A later transfer
                    to the same node makes a new peer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any, Protocol

from cluster.errors import InternalError, ServingError
from cluster.failpoints import failpoint
from kv_transfer.digests import DigestKind, PlaceSeal, agreed_kind
from kv_transfer.failures import FailureReason, failure
from kv_transfer.protocol import FrameHeader, FrameLimits, pack_header
from kv_transfer.sending.kv_session import KvSessionStream

if TYPE_CHECKING:
    from collections.abc import Sequence

    import grpc

    from cluster.node import NodeId
    from cluster.proto import node_pb2 as pb
    from kv_transfer.agent import TransferAgent
    from kv_transfer.handshake import Compatibility
    from kv_transfer.sending.outgoing import FramePlan, Instruction
    from kv_transfer.staging import StagingSlot
    from kv_transfer.transports.base import Endpoint

logger = logging.getLogger(__name__)


class PeerEvents(Protocol):
    """Who decides about transfers."""

    def paired(self, peer: Peer) -> None: ...
    def received(self, peer: Peer, frame: pb.ReceiverFrame) -> None: ...
    def lost(self, peer: Peer, error: ServingError) -> None: ...
    def stuck(self, peer: Peer) -> int: ...
    def next_shipment(self, peer: Peer) -> Any: ...
    def may_post(self, shipment: Any) -> bool: ...
    def did(self, shipment: Any, instructions: list[Instruction]) -> None: ...


class Peer:
    def __init__(
        self,
        node_id: NodeId,
        address: str,
        *,
        us: NodeId,
        ours: Compatibility,
        agent: TransferAgent,
        channel: grpc.aio.Channel,
        events: PeerEvents,
    ) -> None:
        self.node_id = node_id
        self.address = address
        self.is_ready = False
        self.transport_name = ""
        self._us = us
        self._ours = ours
        self._agent = agent
        self._channel = channel
        self._events = events
        self._stream: KvSessionStream | None = None
        self._endpoint: Endpoint | None = None
        self._limits = agent.limits
        self._digest = DigestKind.MULTIPLY_SHIFT
        self._has_work = asyncio.Event()
        self._is_lost = False
        self._shipping: set[asyncio.Task[None]] = set()
        self._running = asyncio.create_task(self._run())

    def send(self, frame: pb.SenderFrame) -> None:
        """Queue a control message; nothing before the pairing or after the loss."""
        if self._stream is not None and not self._is_lost:
            self._stream.send(frame)

    def wake(self) -> None:
        """A transfer may have a frame to ship."""
        self._has_work.set()

    def cut(self) -> None:
        """End the connection, and with it what was posted: the peer takes nothing. Idempotent."""
        if self._stream is not None:
            self._stream.cancel()

    async def close(self) -> None:
        self._running.cancel()
        await asyncio.wait([self._running])

    # ---- pairing --------------------------------------------------------------------------

    async def _run(self) -> None:
        error: ServingError = failure(FailureReason.RECEIVER_LOST)
        pumping: asyncio.Task[None] | None = None
        try:
            async with asyncio.timeout(self._agent.config.pairing_seconds):
                stream, endpoint = await self._pair()
            pumping = asyncio.create_task(self._pump(stream, endpoint))
            endpoint.on_close(stream.cancel)
            self.is_ready = True
            self._events.paired(self)
            async for frame in stream.receive():
                self._events.received(self, frame)
        except ServingError as problem:
            error = problem
        except TimeoutError:
            logger.warning("decode node %s did not answer in time", self.node_id.name)
        except Exception:
            logger.exception("the session with decode node %s broke", self.node_id.name)
            error = InternalError("The KV session broke inside the prefill node.")
        finally:
            await self._lose(error, pumping)

    async def _pair(self) -> tuple[KvSessionStream, Endpoint]:
        stream = await KvSessionStream.open(
            self._channel,
            node_id=self._us,
            ours=self._ours,
            expected=self.node_id,
            digest_kinds=self._agent.pool.digest_kinds,
        )
        self._stream = stream
        hello = stream.hello
        self._digest = agreed_kind(self._agent.pool.digest_kinds, (hello.digest_kind,))
        mine = self._agent.limits
        slot_bytes = min(mine.max_payload_bytes, hello.slot_bytes)
        if slot_bytes < mine.unit_bytes:
            raise failure(FailureReason.LAYOUT_MISMATCH)
        self._limits = FrameLimits(mine.num_layers, mine.unit_bytes, slot_bytes)
        host = hello.data_host
        if host in ("", "0.0.0.0", "::"):
            host = self.address.rpartition(":")[0]
        endpoint = await self._agent.transport.connect(host, hello.data_port, hello.session_id)
        self._endpoint = endpoint
        self.transport_name = self._agent.admit(endpoint)
        self._agent.stats.pairings += 1
        logger.info("paired with decode node %s over %s", self.node_id.name, self.transport_name)
        return stream, endpoint

    async def _lose(self, error: ServingError, pumping: asyncio.Task[None] | None) -> None:
        """Tell first, so that no frame is posted any more; then end what was."""
        self._is_lost = True
        self._events.lost(self, error)
        if pumping is not None:
            pumping.cancel()
            await asyncio.wait([pumping, *self._shipping])
        if self._stream is not None:
            await self._stream.close()
        if self._endpoint is not None and not await self._endpoint.close():
            self._agent.quarantine.keep(
                num_blocks=self._events.stuck(self),
                num_slots=self._agent.staging.num_owned_by(self),
                peer=self.node_id.name,
            )
        await self._channel.close()

    # ---- shipping -------------------------------------------------------------------------

    async def _pump(self, stream: KvSessionStream, endpoint: Endpoint) -> None:
        staging = self._agent.staging
        while True:
            await self._has_work.wait()
            slot = await staging.acquire(self)
            shipment = self._events.next_shipment(self)
            plan = None
            if shipment is not None:
                plan = shipment.machine.next_frame(self._limits.max_units)
            if plan is None:
                self._has_work.clear()
                staging.release(slot)
                continue
            shipping = asyncio.create_task(
                self._ship(shipment, plan, slot, stream.hello.session_id, endpoint)
            )
            self._shipping.add(shipping)
            shipping.add_done_callback(self._shipping.discard)

    async def _ship(
        self,
        shipment: Any,
        plan: FramePlan,
        slot: StagingSlot,
        session_id: int,
        endpoint: Endpoint,
    ) -> None:
        """Pack one frame and post it. The slot is given back when its send has ended."""
        machine, pool = shipment.machine, self._agent.pool
        seal = PlaceSeal(
            seed=shipment.digest_seed,
            layer_start=plan.layer_start,
            num_layers=plan.num_layers,
            positions=plan.positions,
        )
        try:
            gathering = pool.begin_gather(
                slot.payload,
                layer_start=plan.layer_start,
                num_layers=plan.num_layers,
                block_ids=plan.block_ids,
                after=plan.after,
                digest=self._digest,
            )
            seal.prepare()
            digests = seal.seal(await pool.end(gathering))
        except Exception:
            logger.exception("blocks could not be packed")
            self._agent.staging.release(slot)
            error = failure(FailureReason.INTERNAL)
            self._events.did(shipment, machine.dropped(error))
            return
        if not self._events.may_post(shipment):
            self._agent.staging.release(slot)
            self._events.did(shipment, machine.dropped())
            return
        self._post(shipment, plan, slot, digests, session_id, endpoint)

    def _post(
        self,
        shipment: Any,
        plan: FramePlan,
        slot: StagingSlot,
        digests: Any,
        session_id: int,
        endpoint: Endpoint,
    ) -> None:
        seq, instructions = shipment.machine.posted()
        payload_bytes = digests.size * self._limits.unit_bytes
        header = _header_of(shipment, plan, seq, payload_bytes, digests)
        header_bytes = pack_header(header, slot.header.numpy().data)
        sends = (
            endpoint.send(slot.header[:header_bytes], session_id),
            endpoint.send(slot.payload[:payload_bytes], header.nonce),
        )
        began = time.perf_counter()
        ended = asyncio.gather(*sends, return_exceptions=True)
        ended.add_done_callback(
            lambda done: self._sent(shipment, slot, done.result(), payload_bytes, began)
        )
        self._events.did(shipment, instructions)
        failpoint("prefill.after_frame")

    def _sent(
        self,
        shipment: Any,
        slot: StagingSlot,
        results: Sequence[BaseException | None],
        payload_bytes: int,
        began: float,
    ) -> None:
        self._agent.staging.release(slot)
        broken = next((result for result in results if result is not None), None)
        error: ServingError | None = None
        if broken is not None:
            error = broken if isinstance(broken, ServingError) else None
            error = error or failure(FailureReason.LINK_LOST)
        else:
            spent = time.perf_counter() - began
            self._agent.stats.moved(self.transport_name, payload_bytes, spent)
        self._events.did(shipment, shipment.machine.settled(error))


def _header_of(
    shipment: Any, plan: FramePlan, seq: int, payload_bytes: int, digests: Any
) -> FrameHeader:
    """`digests` are sealed."""
    ticket = shipment.machine.ticket
    return FrameHeader(
        transfer_id=shipment.transfer_id,
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
