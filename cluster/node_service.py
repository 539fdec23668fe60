"""The gRPC face that every node has: Describe, Session, Control, Inspect, FetchPrefix.

Life of a session (one per gateway and node)
    1. The gateway opens the stream and says hello; another protocol version is refused, and one
       that means another node, before that could cost it the session that it has here.
    2. The node answers with its description. From here its `Step` frames flow as they come,
       merged while the stream is slower than the engine. A gateway that hears states is told when
       the node's changes, and answers (`state_notices.py`).
    3. Submit, Cancel and Orphaned frames go to the node's `Handler`, in order.
    4. The stream ends, or falls too far behind: the handler hears that the gateway is gone
       and ends what it ran for it.

A frame that cannot be decoded, or that the handler breaks over, ends its sequence; one that does
not even say which sequence ends the session with a typed error. Neither ends the node.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import grpc
import grpc.aio

from cluster.codec import PROTOCOL_VERSION, checked_id, decode_handoff, decode_sequence
from cluster.delta_codec import encode_error
from cluster.errors import (
    HandshakeMismatch,
    InternalError,
    InvalidRequest,
    NodeUnavailable,
    ServingError,
)
from cluster.isolation import tried
from cluster.proto import node_pb2 as pb
from cluster.proto import node_pb2_grpc
from cluster.request import Handoff, SequenceRequest, TokenDelta

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from cluster.session_hub import SessionHub

logger = logging.getLogger(__name__)
HELLO_SECONDS = 5.0


class Handler(Protocol):
    """What a role does with the frames. Called on the event loop; must not block."""

    def submit(self, gateway_id: str, sequence: SequenceRequest, handoff: Handoff | None) -> None:
        """Take the sequence, or raise a `ServingError` that becomes its last delta."""

    def cancel(self, sequence_id: str) -> None: ...
    def orphaned(self, gateway_id: str, sequence_id: str) -> None: ...
    def gateway_gone(self, gateway_id: str) -> None: ...
    def reset_prefix_cache(self) -> None: ...
    async def inspect(self) -> pb.InspectReply: ...


class Standing(Protocol):
    """How the node stands in the cluster: a `Member`."""

    def description(self) -> pb.NodeDescription: ...
    def control(self, action: pb.ControlRequest.Action) -> str:
        """Carry out an operator's order; the state after it. Raises `InvalidRequest`."""


class PrefixSource(Protocol):
    """Where other nodes may fetch what is cached here."""

    async def send(
        self, prefix: SequenceRequest, handoff: Handoff, restore_seconds_per_token: float
    ) -> int:
        """Begin to send it to the node that `handoff` names; how many tokens of it are sent. Those
        that are in host memory alone count if bringing one takes no longer than that. Raises a
        `ServingError` when none are to be had."""


class NodeService(node_pb2_grpc.NodeServicer):
    def __init__(
        self,
        handler: Handler,
        hub: SessionHub,
        member: Standing,
        prefixes: PrefixSource | None = None,
    ) -> None:
        """`prefixes` None: nothing is given away."""
        self._handler = handler
        self._hub = hub
        self._member = member
        self._prefixes = prefixes

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.NodeDescription:
        return self._member.description()

    async def Control(self, request: pb.ControlRequest, context: Any) -> pb.ControlReply:
        if request.action == pb.ControlRequest.RESET_PREFIX_CACHE:
            self._handler.reset_prefix_cache()
        return pb.ControlReply(state=self._member.control(request.action))

    async def Inspect(self, request: pb.InspectRequest, context: Any) -> pb.InspectReply:
        reply = await self._handler.inspect()
        reply.awaited_gateways.extend(self._hub.awaited_gateways)
        return reply

    async def FetchPrefix(
        self, request: pb.FetchPrefixRequest, context: Any
    ) -> pb.FetchPrefixReply:
        if self._prefixes is None:
            raise NodeUnavailable("This node gives no prefixes away.", reason="not_offered")
        prefix, handoff = decode_sequence(request.sequence), decode_handoff(request.handoff)
        num_tokens = await self._prefixes.send(prefix, handoff, request.restore_seconds_per_token)
        return pb.FetchPrefixReply(num_tokens=num_tokens)

    async def Session(
        self, frames: AsyncIterator[pb.GatewayFrame], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.NodeFrame]:
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                hello = hello_of(await anext(frames, None))
            welcome = self._member.description()
            check_is_meant(hello, welcome)
        except TimeoutError:
            return
        except ServingError as error:
            yield pb.NodeFrame(refused=encode_error(error))
            return
        gateway_id = hello.gateway_id
        session = self._hub.open(gateway_id, hears_state=hello.hears_state)
        logger.info("gateway %s connected", gateway_id)
        reader = asyncio.create_task(self._read(gateway_id, frames))
        reader.add_done_callback(lambda _: session.close())
        try:
            yield pb.NodeFrame(welcome=welcome)
            async for frame in session:
                yield frame
            if reader.done() and (broken := ending_of(reader)) is not None:
                raise broken
        finally:
            reader.cancel()
            if self._hub.close(session):
                logger.info("gateway %s disconnected", gateway_id)
                self._handler.gateway_gone(gateway_id)

    async def _read(self, gateway_id: str, frames: AsyncIterator[pb.GatewayFrame]) -> None:
        async for frame in frames:
            match frame.WhichOneof("frame"):
                case "submit":
                    self._submit(gateway_id, frame.submit)
                case "cancel":
                    self._cancel(gateway_id, frame.cancel.sequence_id)
                case "orphaned":
                    orphan = frame.orphaned.sequence_id
                    orphaned = partial(self._handler.orphaned, gateway_id, orphan)
                    self._serve(gateway_id, orphan, orphaned)
                case "state_answer":
                    self._hub.answered(gateway_id, frame.state_answer)
                case other:
                    raise InvalidRequest(f"A session does not take {other} here.")

    def _submit(self, gateway_id: str, submit: pb.Submit) -> None:
        """Raises for a sequence without a valid id: no delta could tell whose end it is."""
        sequence_id = checked_id("sequence_id", submit.sequence.sequence_id)
        if not self._serve(gateway_id, sequence_id, lambda: self._take(gateway_id, submit)):
            self._cancel(gateway_id, sequence_id)  # what it had begun

    def _take(self, gateway_id: str, submit: pb.Submit) -> None:
        try:
            sequence = decode_sequence(submit.sequence)
            self._hub.log.taken(sequence)
            handoff = decode_handoff(submit.handoff) if submit.HasField("handoff") else None
            self._handler.submit(gateway_id, sequence, handoff)
        except ServingError as error:
            self._end(gateway_id, submit.sequence.sequence_id, error)

    def _cancel(self, gateway_id: str, sequence_id: str) -> None:
        self._serve(gateway_id, sequence_id, partial(self._handler.cancel, sequence_id))

    def _serve(self, gateway_id: str, sequence_id: str, serve: Callable[[], None]) -> bool:
        """False when the role breaks over it. All sequences of a gateway hang on who reads its
        frames: only this one ends."""
        broken = tried(serve)
        if broken is None:
            return True
        told = self._hub.log.facts(sequence_id)
        logger.error("a frame about a sequence could not be served", exc_info=broken, extra=told)
        self._end(gateway_id, sequence_id, InternalError("The node failed at this sequence."))
        return False

    def _end(self, gateway_id: str, sequence_id: str, error: ServingError) -> None:
        self._hub.publish(gateway_id, [TokenDelta(sequence_id=sequence_id, error=error)])


def ending_of(reader: asyncio.Task[None]) -> BaseException | None:
    """Why a session's reader has ended, unless the gateway simply left."""
    if reader.cancelled():
        return None
    error = reader.exception()
    return None if isinstance(error, (grpc.RpcError, grpc.aio.BaseError)) else error


def hello_of(frame: pb.GatewayFrame | None) -> pb.GatewayHello:
    """The gateway's first frame, once it is found to be a hello of our version."""
    if frame is None or frame.WhichOneof("frame") != "hello":
        raise InvalidRequest("A session must begin with hello.")
    if frame.hello.protocol_version != PROTOCOL_VERSION:
        raise HandshakeMismatch(
            f"This node speaks protocol {PROTOCOL_VERSION}, "
            f"the gateway speaks {frame.hello.protocol_version}."
        )
    checked_id("gateway_id", frame.hello.gateway_id)
    return frame.hello


def check_is_meant(hello: pb.GatewayHello, welcome: pb.NodeDescription) -> None:
    """Raises `HandshakeMismatch`: the process that the gateway knows at this address has gone."""
    if hello.incarnation not in (0, welcome.incarnation):
        raise HandshakeMismatch("Another node answers at this address.")
