"""The gRPC service that prefill nodes call: one stream per pair of nodes.

Life of a stream
    1. The peer says hello; a mismatch is answered with the typed error and the stream ends, before
       its slots are mapped. So is a peer that means an earlier process at this address, before that
       could cost it the session that it has here.
    2. Messages of the peer become events of the receiver; the receiver's instructions to the
       peer go out in order.
    3. The end of the stream, from either side or by the death of the peer, ends the session.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from cluster.codec import checked_id, checked_transfer_id, decode_policy, decode_sequence
from cluster.delta_codec import decode_error, encode_error
from cluster.errors import InvalidRequest, ServingError
from cluster.message_size import BASE_MESSAGE_BYTES
from cluster.node import Incarnation, NodeId, NodeName
from cluster.proto import node_pb2 as pb
from cluster.proto import node_pb2_grpc as rpc
from kv_transfer.digests import agreed_kind
from kv_transfer.failures import FailureReason, failure
from kv_transfer.handshake import Compatibility
from kv_transfer.receiving.incoming import IncomingSequence
from kv_transfer.receiving.intake_instructions import (
    Instruction,
    SendAbort,
    SendCommitted,
    SendRefused,
    SendRenew,
    SendTicket,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from kv_transfer.receiving.receiver import KVReceiver
    from kv_transfer.receiving.receiver_session import ReceiverSession
    from kv_transfer.transfer import Ticket

logger = logging.getLogger(__name__)


class KvReceiverService(rpc.KvReceiverServicer):
    """`KvReceiver` of a decode node."""

    def __init__(self, receiver: KVReceiver, max_message_bytes: int = BASE_MESSAGE_BYTES) -> None:
        """`max_message_bytes`: of the server that this is a service of."""
        self._receiver = receiver
        self._max_message_bytes = max_message_bytes

    async def KvSession(
        self, request_iterator: AsyncIterator[pb.SenderFrame], context: Any
    ) -> AsyncIterator[pb.ReceiverFrame]:
        timeout = self._receiver.agent.config.pairing_seconds
        try:
            first = await asyncio.wait_for(anext(request_iterator), timeout)
            session = await self._greet(first)
        except (StopAsyncIteration, TimeoutError):
            return
        except ServingError as error:
            yield pb.ReceiverFrame(refused_hello=encode_error(error))
            return
        reading = asyncio.create_task(self._read(session, request_iterator))
        try:
            yield pb.ReceiverFrame(hello=self._hello(session))
            while (instruction := await session.outbox.get()) is not None:
                yield encode_instruction(instruction)
        finally:
            reading.cancel()
            self._receiver.close_session(session)

    async def _greet(self, frame: pb.SenderFrame) -> ReceiverSession:
        if frame.WhichOneof("frame") != "hello":
            raise InvalidRequest("The first frame of a KV session must be hello.")
        hello = frame.hello
        theirs = Compatibility(hello.protocol_version, hello.compatibility_hash)
        name = NodeName(checked_id("name", hello.name))
        peer = NodeId(name, Incarnation(hello.incarnation))
        agent = self._receiver.agent
        if hello.receiver_incarnation not in (0, self._receiver.node_id.incarnation):
            raise failure(FailureReason.RECEIVER_LOST)
        session = self._receiver.open_session(peer, theirs)
        session.digest_kind = agreed_kind(agent.pool.digest_kinds, hello.digest_kinds)
        with ExitStack() as undo:
            undo.callback(self._receiver.close_session, session)
            if hello.slots:
                slots = await asyncio.to_thread(agent.map_slots, hello.slots)
                session.sender_slots.extend(slots)
            undo.pop_all()
        return session

    def _hello(self, session: ReceiverSession) -> pb.ReceiverHello:
        receiver = self._receiver
        return pb.ReceiverHello(
            name=receiver.node_id.name,
            incarnation=receiver.node_id.incarnation,
            data_host=receiver.agent.config.kv_host,
            data_port=receiver.data_port,
            slot_bytes=receiver.agent.limits.slot_bytes,
            session_id=session.id,
            digest_kind=session.digest_kind,
            max_message_bytes=self._max_message_bytes,
            messages_at=receiver.messages_at if session.sender_slots else b"",
        )

    async def _read(self, session: ReceiverSession, frames: AsyncIterator[pb.SenderFrame]) -> None:
        try:
            async for frame in frames:
                self._dispatch(session, frame)
        except ServingError as error:
            logger.warning("prefill node %s broke the protocol: %s", session.peer.name, error)
        finally:
            self._receiver.close_session(session)

    def _dispatch(self, session: ReceiverSession, frame: pb.SenderFrame) -> None:
        receiver = self._receiver
        match frame.WhichOneof("frame"):
            case "reserve":
                self._reserve(session, frame.reserve)
            case "abort":
                abort = frame.abort
                error = decode_error(abort.error) if abort.HasField("error") else None
                receiver.sender_aborted(session, abort.transfer_id, abort.num_frames_posted, error)
            case "abort_ack":
                receiver.abort_acked(session, frame.abort_ack)
            case "renew":
                receiver.renewed(session, frame.renew)
            case other:
                raise InvalidRequest(f"A KV session does not take {other} here.")

    def _reserve(self, session: ReceiverSession, reserve: pb.Reserve) -> None:
        """A request that does not decode is refused; the session goes on."""
        transfer_id = checked_transfer_id(reserve.transfer_id)
        try:
            sequence = IncomingSequence(
                transfer_id=transfer_id,
                attempt=reserve.attempt,
                request=decode_sequence(reserve.sequence),
                gateway_id=reserve.gateway_id,
                kv_load_failure_policy=decode_policy(reserve.kv_load_failure_policy),
            )
        except InvalidRequest as error:
            session.send(SendRefused(session.id, transfer_id, error))
            return
        self._receiver.reserve_asked(session, sequence)


def encode_instruction(instruction: Instruction) -> pb.ReceiverFrame:
    """The message of an instruction that addresses the peer."""
    match instruction:
        case SendTicket(_, ticket):
            return pb.ReceiverFrame(ticket=_encode_ticket(ticket))
        case SendRefused(_, transfer_id, error):
            refused = pb.Refused(transfer_id=transfer_id, error=encode_error(error))
            return pb.ReceiverFrame(refused=refused)
        case SendCommitted(_, transfer_id, error):
            committed = pb.Committed(transfer_id=transfer_id)
            if error is not None:
                committed.error.CopyFrom(encode_error(error))
            return pb.ReceiverFrame(committed=committed)
        case SendAbort(_, transfer_id, epoch, error):
            abort = pb.ReceiverAbort(
                transfer_id=transfer_id, epoch=epoch, error=encode_error(error)
            )
            return pb.ReceiverFrame(abort=abort)
        case SendRenew(_, transfer_id, extend_seconds):
            renew = pb.Renew(transfer_id=transfer_id, extend_seconds=extend_seconds)
            return pb.ReceiverFrame(renew=renew)
        case _:
            raise TypeError(f"{type(instruction).__name__} is not for the peer")


def _encode_ticket(ticket: Ticket) -> pb.Ticket:
    return pb.Ticket(
        transfer_id=ticket.transfer_id,
        incarnation=ticket.incarnation,
        epoch=ticket.epoch,
        nonce=ticket.nonce,
        expires_in_seconds=ticket.expires_in_seconds,
        missing_positions=ticket.missing_positions,
    )
