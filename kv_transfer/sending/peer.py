"""One decode node as the sender sees it: the pairing, and what is sent to it.

Life of a peer
    1. CONNECTING   control stream, then data endpoint. Transfers may wait meanwhile.
    2. READY        messages go both ways; frames of the transfers that have some are packed
                    and posted (`shipping.py`), in the order the transfers were opened.
    3. LOST         the stream or the endpoint ended, or pairing failed. The transfers are
                    told, the endpoint is closed, and what was posted ends. A later transfer
                    to the same node makes a new peer.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Protocol

from cluster.errors import InvalidRequest, ServingError, TransferFailed
from cluster.message_size import check_fits, limit_of
from kv_transfer.digests import agreed_kind
from kv_transfer.failures import FailureReason, failure
from kv_transfer.protocol import SLOT_READ_BYTES, FrameLimits
from kv_transfer.sending.data_link import DataLink
from kv_transfer.sending.kv_session import KvSessionStream
from kv_transfer.sending.shipping import Shipping
from kv_transfer.transports.local_messages import connect as connect_messages

if TYPE_CHECKING:
    import grpc

    from cluster.node import NodeId
    from cluster.proto import node_pb2 as pb
    from kv_transfer.agent import TransferAgent
    from kv_transfer.handshake import Compatibility
    from kv_transfer.protocol import CommitMessage
    from kv_transfer.sending.outgoing import Instruction
    from kv_transfer.transports.base import Endpoint
    from kv_transfer.transports.local_messages import LocalMessages

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
        self._messages: LocalMessages | None = None
        self._shipping: Shipping | None = None
        self._is_lost = False
        self.running = asyncio.create_task(self._run())  # until nothing of it is left

    @property
    def num_posted(self) -> int:
        """Headers and commits that went out on the data link."""
        return 0 if self._shipping is None else self._shipping.num_posted

    def send(self, frame: pb.SenderFrame) -> None:
        """Queue a control message; nothing before the pairing or after the loss. Raises
        `RequestTooLarge` for one that the peer does not take: it would end the pairing."""
        if self._stream is not None and not self._is_lost:
            check_fits(frame, limit_of(self._stream.hello.max_message_bytes))
            self._stream.send(frame)

    def wake(self) -> None:
        """A transfer may have a frame to ship."""
        if self._shipping is not None:
            self._shipping.wake()

    def commit(self, commit: CommitMessage) -> None:
        """All frames of a transfer were posted."""
        if self._shipping is not None:
            self._shipping.commit(commit)

    def cut(self) -> None:
        """End the connection, and with it what was posted: the peer takes nothing. Idempotent."""
        if self._stream is not None:
            self._stream.cancel()

    async def close(self) -> None:
        await asyncio.sleep(0)  # it has begun, so it can be cancelled
        if not self._is_lost:  # what ends it already must not be cut short
            self.running.cancel()
        await asyncio.wait([self.running])

    # ---- pairing --------------------------------------------------------------------------

    async def _run(self) -> None:
        error: ServingError = failure(FailureReason.RECEIVER_LOST)
        try:
            async with asyncio.timeout(self._agent.config.pairing_seconds):
                stream, link = await self._pair()
            self._shipping = Shipping(self._agent, link, self, self.cut)
            link.endpoint.on_close(stream.cancel)
            if link.messages is not None:
                link.messages.on_close(stream.cancel)
            self.is_ready = True
            self._events.paired(self)
            async for frame in stream.receive():
                self._events.received(self, frame)
        except InvalidRequest as problem:  # of the node's, not of a client's
            logger.warning("decode node %s broke the protocol: %s", self.node_id.name, problem)
        except ServingError as problem:
            error = problem
        except TimeoutError:
            logger.warning("decode node %s did not answer in time", self.node_id.name)
        except Exception:  # the top of the task: its transfers end with the session
            logger.exception("the session with decode node %s broke", self.node_id.name)
            error = failure(FailureReason.INTERNAL)
        finally:
            await self._lose(error)

    async def _pair(self) -> tuple[KvSessionStream, DataLink]:
        stream = await KvSessionStream.open(
            self._channel,
            node_id=self._us,
            ours=self._ours,
            expected=self.node_id,
            digest_kinds=self._agent.pool.digest_kinds,
            slots=self._agent.staging.description,
        )
        self._stream = stream
        hello = stream.hello
        mine = self._agent.limits
        slot_bytes = min(mine.slot_bytes, hello.slot_bytes)
        if slot_bytes < mine.unit_bytes:
            raise failure(FailureReason.LAYOUT_MISMATCH)
        limits = FrameLimits(mine.num_layers, mine.unit_bytes, slot_bytes)
        host = hello.data_host
        if host in ("", "0.0.0.0", "::"):
            host = self.address.rpartition(":")[0]
        endpoint = await self._agent.transport.connect(host, hello.data_port, hello.session_id)
        self._endpoint = endpoint
        self.transport_name = self._agent.admit(endpoint)
        self._agent.stats.pairings += 1
        logger.info("paired with decode node %s over %s", self.node_id.name, self.transport_name)
        digest = agreed_kind(self._agent.pool.digest_kinds, (hello.digest_kind,))
        self._messages = await self._connect_messages(hello)
        return stream, DataLink(
            endpoint=endpoint,
            session_id=hello.session_id,
            transport_name=self.transport_name,
            limits=limits,
            digest=digest,
            pieces=self._agent.pieces_of(endpoint, digest),
            messages=self._messages,
        )

    async def _connect_messages(self, hello: pb.ReceiverHello) -> LocalMessages | None:
        """None where payloads are to be sent: our slots are not mapped there, or the operator keeps
        UCX from what reads them."""
        if not hello.messages_at or self.transport_name != "cuda_ipc":
            return None
        try:
            return await connect_messages(
                hello.messages_at, hello.session_id, max_bytes=SLOT_READ_BYTES
            )
        except TransferFailed:
            logger.warning(
                "decode node %s has mapped our slots, but its local socket cannot be reached from "
                "here, so payloads are sent. Only nodes in one network namespace read slots",
                self.node_id.name,
            )
            return None

    async def _lose(self, error: ServingError) -> None:
        """Tell first, so that no frame is posted any more; then end what was."""
        self._is_lost = True
        self._events.lost(self, error)
        has_packed = self._shipping is None or await self._shipping.stop()
        if self._stream is not None:
            await self._stream.close()
        if self._messages is not None:
            self._messages.close()
        is_cut = self._endpoint is None or await _is_closed(self._endpoint)
        if not (has_packed and is_cut):
            self._agent.quarantine.keep(
                num_blocks=self._events.stuck(self),
                num_slots=self._agent.staging.num_owned_by(self),
                peer=self.node_id.name,
            )
        await self._channel.close()

    # ---- shipping (`Shipper`) -------------------------------------------------------------

    def next_shipment(self) -> Any:
        return self._events.next_shipment(self)

    def may_post(self, shipment: Any) -> bool:
        return self._events.may_post(shipment)

    def did(self, shipment: Any, instructions: list[Instruction]) -> None:
        self._events.did(shipment, instructions)


async def _is_closed(endpoint: Endpoint) -> bool:
    """Whether nothing that was posted touches memory any more."""
    try:
        return await endpoint.close()
    except Exception:  # the transport's; who knows what it still reads
        logger.exception("a connection could not be cut")
        return False
