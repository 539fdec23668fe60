"""The gRPC stream from this prefill node to one decode node's `KvReceiver`.

Life of a stream
    1. `open`: hello out, hello in, or the typed reason why not.
    2. `send` queues a message; one task writes them in order. `receive` yields what comes.
    3. It ends when either side closes it or the peer dies: `receive` ends, and that is the
       loss of the peer.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import grpc

from cluster.codec import checked_transfer_id, encode_sequence
from cluster.delta_codec import decode_error, encode_error
from cluster.errors import InvalidRequest, ServingError
from cluster.proto import node_pb2 as pb
from cluster.proto import node_pb2_grpc as rpc
from kv_transfer.failures import FailureReason, failure
from kv_transfer.sending.outgoing_instructions import SendAbort, SendAbortAck
from kv_transfer.transfer import Ticket

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from cluster.node import NodeId
    from cluster.request import Handoff, SequenceRequest
    from kv_transfer.digests import DigestKind
    from kv_transfer.handshake import Compatibility

logger = logging.getLogger(__name__)


class KvSessionStream:
    """One stream. Made by `open`."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._outbox: asyncio.Queue[pb.SenderFrame] = asyncio.Queue()
        self._writing: asyncio.Task[None] | None = None
        self.hello: pb.ReceiverHello

    @classmethod
    async def open(
        cls,
        channel: grpc.aio.Channel,
        *,
        node_id: NodeId,
        ours: Compatibility,
        expected: NodeId,
        digest_kinds: Sequence[DigestKind] = (),
        slots: bytes = b"",
    ) -> KvSessionStream:
        """`slots`: as `mapped_slots.describe` has them. Raises `HandshakeMismatch` when the pair
        does not fit, `TransferFailed` when the peer cannot be reached or is another process than
        `expected`."""
        call = rpc.KvReceiverStub(channel).KvSession()  # type: ignore[no-untyped-call]
        stream = cls(call)
        hello = pb.SenderHello(
            name=node_id.name,
            incarnation=node_id.incarnation,
            protocol_version=ours.protocol_version,
            compatibility_hash=ours.compatibility_hash,
            digest_kinds=digest_kinds,
            slots=slots,
            receiver_incarnation=expected.incarnation,
        )
        try:
            await call.write(pb.SenderFrame(hello=hello))
            answer = await call.read()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise failure(FailureReason.RECEIVER_LOST) from error
        stream.hello = _checked_hello(answer, expected)
        stream._writing = asyncio.create_task(stream._write())
        return stream

    def send(self, frame: pb.SenderFrame) -> None:
        self._outbox.put_nowait(frame)

    async def receive(self) -> AsyncIterator[pb.ReceiverFrame]:
        """Until the stream ends, however it ends."""
        try:
            while (frame := await self._call.read()) is not grpc.aio.EOF:
                yield frame
        except grpc.aio.AioRpcError as error:
            logger.debug("a KV session ended: %s", error.code())
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            logger.debug("a KV session was cut here")

    def cancel(self) -> None:
        """End the stream; `receive` ends with it. Idempotent."""
        self._call.cancel()

    async def close(self) -> None:
        self.cancel()
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.wait([self._writing])

    async def _write(self) -> None:
        """Ends with the stream; `receive` tells the loss."""
        try:
            while True:
                await self._call.write(await self._outbox.get())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            logger.debug("a KV session cannot be written: %s", error)


def _checked_hello(answer: Any, expected: NodeId) -> pb.ReceiverHello:
    if answer is grpc.aio.EOF:
        raise failure(FailureReason.RECEIVER_LOST)
    kind = answer.WhichOneof("frame")
    if kind == "refused_hello":
        raise _handshake_error(decode_error(answer.refused_hello))
    hello = answer.hello
    if kind != "hello" or (hello.name, hello.incarnation) != (expected.name, expected.incarnation):
        raise failure(FailureReason.RECEIVER_LOST)
    return hello  # type: ignore[no-any-return]


def _handshake_error(error: ServingError) -> ServingError:
    """Classes that share a code lose their name on the wire; the reason tells them apart."""
    if error.reason == FailureReason.LAYOUT_MISMATCH.value:
        return failure(FailureReason.LAYOUT_MISMATCH)
    return error


# ---- messages out -----------------------------------------------------------------------


def reserve_frame(request: SequenceRequest, handoff: Handoff) -> pb.SenderFrame:
    return pb.SenderFrame(
        reserve=pb.Reserve(
            transfer_id=handoff.transfer_id,
            attempt=handoff.attempt,
            sequence=encode_sequence(request),
            gateway_id=handoff.gateway_id,
            kv_load_failure_policy=handoff.kv_load_failure_policy,
        )
    )


def renew_frame(transfer_id: bytes, extend_seconds: float, num_posted: int) -> pb.SenderFrame:
    """`num_posted`: headers and commits that the data link of the pair has been given."""
    renew = pb.Renew(transfer_id=transfer_id, extend_seconds=extend_seconds, num_posted=num_posted)
    return pb.SenderFrame(renew=renew)


def encode_instruction(instruction: SendAbort | SendAbortAck, transfer_id: bytes) -> pb.SenderFrame:
    if isinstance(instruction, SendAbortAck):
        ack = pb.AbortAck(
            transfer_id=transfer_id,
            epoch=instruction.epoch,
            num_frames_posted=instruction.num_frames_posted,
        )
        return pb.SenderFrame(abort_ack=ack)
    abort = pb.SenderAbort(transfer_id=transfer_id, num_frames_posted=instruction.num_frames_posted)
    if instruction.error is not None:
        abort.error.CopyFrom(encode_error(instruction.error))
    return pb.SenderFrame(abort=abort)


# ---- messages in ------------------------------------------------------------------------


def decode_ticket(message: pb.Ticket) -> Ticket:
    """Raises `InvalidRequest` when the peer sends what no ticket can be."""
    if not message.expires_in_seconds >= 0.0:
        raise InvalidRequest("expires_in_seconds is out of range.", param="expires_in_seconds")
    return Ticket(
        transfer_id=checked_transfer_id(message.transfer_id),
        incarnation=message.incarnation,
        epoch=message.epoch,
        nonce=message.nonce,
        expires_in_seconds=message.expires_in_seconds,
        missing_positions=tuple(message.missing_positions),
    )
