"""One node as this gateway talks to it: a stream of orders one way, of tokens the other.

Life of a client (one per node and incarnation)
    1. `start` opens the channel and keeps a `Session` on it: hello, welcome, then frames.
    2. While the session stands the node may get work (`is_connected`).
    3. Its process is pinged all the time (`pulse_watch.py`): silence ends the session within a
       second or two. A node that sends nothing is asked whether its event loop lives (`Describe`),
       soon when it owes tokens and now and then when it does not, and has more time to answer.
    4. The session's end is the loss of the node for every sequence that needs it: `on_lost` is
       called at once. The client tries again, with growing pauses, until `close`.
    5. When the node's state changes, it says so. `on_state` is called, and the node gets an answer,
       behind whatever was sent before; and another, if some of what was placed there is still on
       its way, when that has come (`settle`). Of one that leaves, losses are in order
       (`departure.py`).

A welcome from another incarnation, role or protocol is no session: the address was reused.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

import grpc

from cluster.codec import PROTOCOL_VERSION, decode_description
from cluster.delta_codec import decode_delta, decode_error
from cluster.errors import HandshakeMismatch, InternalError, InvalidRequest, ServingError
from cluster.message_size import BASE_MESSAGE_BYTES, check_fits, limit_of
from cluster.node import NodeState
from cluster.proto import node_pb2 as pb
from cluster.proto import node_pb2_grpc
from cluster.request import TokenDelta
from cluster.rpc import is_cancelled, open_channel
from gateway.departure import Departure
from gateway.node_calls import NodeCalls
from gateway.pulse_watch import PulseWatch

if TYPE_CHECKING:
    from cluster.clock import Clock
    from cluster.node import NodeInfo

logger = logging.getLogger(__name__)

WELCOME_SECONDS = 5.0
FIRST_PAUSE_SECONDS = 0.1
MAX_PAUSE_SECONDS = 3.0
WATCH_SECONDS = 0.25
IDLE_PATIENCE = 4  # times `probe_after`: how long a node that owes nothing may be silent
MAX_QUEUED_FRAMES = 16_384


class SessionListener(Protocol):
    """Who hears of a client's session. Called on the event loop; must not block."""

    def on_connected(self, client: NodeClient) -> None: ...
    def on_deltas(self, client: NodeClient, deltas: list[TokenDelta]) -> None: ...
    def on_state(self, client: NodeClient, state: NodeState) -> None: ...
    def on_lost(self, client: NodeClient) -> None: ...
    def owes_tokens(self, client: NodeClient) -> bool:
        """True while some sequence waits for this node."""

    def is_on_its_way(self, client: NodeClient) -> bool:
        """True while some sequence has yet to start on this node, where it is to be decoded."""


class NodeClient:
    """See the module. `probe_after`, `probe_timeout` and `pulse_timeout` are seconds, 0 of the last
    means no pings."""

    def __init__(
        self,
        node: NodeInfo,
        gateway_id: str,
        listener: SessionListener,
        *,
        clock: Clock,
        probe_after: float,
        probe_timeout: float,
        pulse_timeout: float = 0.0,
    ) -> None:
        self.node = node
        self._gateway_id = gateway_id
        self._listener = listener
        self._clock = clock
        self._probe_after = probe_after
        self._probe_timeout = probe_timeout
        self._pulse: PulseWatch | None = None
        if pulse_timeout > 0:
            self._pulse = PulseWatch(
                node.grpc_address,
                timeout=pulse_timeout,
                is_urgent=lambda: listener.owes_tokens(self),
                clock=clock,
            )
        self._frames: deque[pb.GatewayFrame] = deque()
        self._has_frames = asyncio.Event()
        self._max_message_bytes = BASE_MESSAGE_BYTES  # of the node, as its welcome says
        self._call: Any = None  # the running Session call; grpc.aio has no types
        self.departure = Departure()
        self._unsettled: int | None = None  # the notice that has yet to be settled
        self._heard_at: float | None = None
        self._task: asyncio.Task[None] | None = None
        self._channel = open_channel(node.grpc_address)
        self._stub: Any = node_pb2_grpc.NodeStub(self._channel)  # type: ignore[no-untyped-call]
        self.calls = NodeCalls(self._channel)

    @property
    def is_connected(self) -> bool:
        return self._call is not None

    def silent_for(self, now: float) -> float | None:
        """Seconds since the node was last known to live; None when it never was."""
        if self.is_connected:
            return 0.0
        return None if self._heard_at is None else now - self._heard_at

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"session {self.node.id.name}")

    async def close(self) -> None:
        """End the session; what still ran through it is lost."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self._channel.close()

    def send(self, frame: pb.GatewayFrame) -> bool:
        """Queue a frame; False when there is no session to carry it. Raises `RequestTooLarge` for
        one that the node does not take: it would end the session."""
        if self._call is None:
            return False
        check_fits(frame, self._max_message_bytes)
        if len(self._frames) >= MAX_QUEUED_FRAMES:
            logger.error("node %s does not take frames any more", self.node.id.name)
            self._call.cancel()
            return False
        self._frames.append(frame)
        self._has_frames.set()
        return True

    def settle(self) -> None:
        """To be called when less may be on its way to this node than before."""
        if self._unsettled is not None and not self._listener.is_on_its_way(self):
            self._answer(self._unsettled, is_settled=True)
            self._unsettled = None

    def _answer(self, number: int, *, is_settled: bool) -> None:
        answer = pb.StateAnswer(number=number, is_settled=is_settled)
        self.send(pb.GatewayFrame(state_answer=answer))

    # ---- the session ---------------------------------------------------------------------

    async def _run(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        told = None  # a reason is news once, however often it is met
        while True:
            began = self._clock()
            try:
                await self._session()
            except (grpc.RpcError, TimeoutError, ServingError) as error:
                if (reason := _reason(error)) != told:
                    name = self.node.id.name
                    logger.info("no session with node %s, tried on and on: %s", name, reason)
                    told = reason
            except Exception:  # a bug of ours: it cost the session, and must not cost the next
                logger.exception("the session with node %s broke", self.node.id.name)
            if self._clock() - began > MAX_PAUSE_SECONDS:
                pause, told = FIRST_PAUSE_SECONDS, None
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, MAX_PAUSE_SECONDS)

    async def _session(self) -> None:
        call = self._stub.Session()
        try:
            await self._shake_hands(call)
            await self._serve(call)
        except asyncio.CancelledError:
            if is_cancelled():
                raise
        finally:
            call.cancel()

    async def _shake_hands(self, call: Any) -> None:
        hello = pb.GatewayHello(
            gateway_id=self._gateway_id,
            protocol_version=PROTOCOL_VERSION,
            hears_state=True,
            incarnation=self.node.id.incarnation,
        )
        async with asyncio.timeout(WELCOME_SECONDS):
            await call.write(pb.GatewayFrame(hello=hello))
            frame = await call.read()
        if frame is grpc.aio.EOF:
            raise HandshakeMismatch("The node ended the session before its welcome.")
        if frame.WhichOneof("frame") == "refused":
            raise decode_error(frame.refused)
        said = decode_description(frame.welcome, grpc_address=self.node.grpc_address)
        if said.id != self.node.id or said.role is not self.node.role:
            raise HandshakeMismatch("Another node answers at this address.")
        self._max_message_bytes = limit_of(frame.welcome.max_message_bytes)

    async def _serve(self, call: Any) -> None:
        """From welcome to loss."""
        self._frames.clear()
        self._heard_at = self._clock()
        self.departure.opened()
        self._unsettled = None
        self._call = call
        helpers = [
            asyncio.create_task(self._write(call)),
            asyncio.create_task(self._watch(call)),
            asyncio.create_task(self._watch_pulse(call)),
        ]
        logger.info("connected to %s node %s", self.node.role, self.node.id.name)
        self._listener.on_connected(self)
        level, end = logging.WARNING, "lost"
        try:
            await self._read(call)
            level, end = logging.INFO, "parted from"  # in order, as by a node that has drained
        finally:
            self._call = None
            for helper in helpers:
                helper.cancel()
            if is_cancelled():
                level, end = logging.INFO, "left"
            logger.log(level, "%s %s node %s", end, self.node.role, self.node.id.name)
            self._listener.on_lost(self)

    async def _read(self, call: Any) -> None:
        name = self.node.id.name
        while True:
            frame = await call.read()
            if frame is grpc.aio.EOF:
                self.departure.ended(in_order=True)
                return
            self._heard_at = self._clock()
            match frame.WhichOneof("frame"):
                case "step":
                    deltas = [_decoded(message) for message in frame.step.deltas]
                    self._listener.on_deltas(self, deltas)
                case "state_notice":
                    self._on_notice(frame.state_notice)
                case None:
                    logger.debug("node %s sent a frame of a kind that is not known here", name)
                case kind:
                    raise InvalidRequest(f"Node {name} sent an unexpected frame: {kind}.")

    def _on_notice(self, notice: pb.StateNotice) -> None:
        if notice.state in set(NodeState):
            state = NodeState(notice.state)
            logger.info("node %s says that it is %s", self.node.id.name, state)
            self.departure.told(state)
            self._listener.on_state(self, state)
        self._answer(notice.number, is_settled=False)
        self._unsettled = notice.number
        self.settle()

    async def _write(self, call: Any) -> None:
        """The stream is broken when writing fails: the reader must not wait for it."""
        try:
            while True:
                while self._frames:
                    await call.write(self._frames.popleft())
                self._has_frames.clear()
                await self._has_frames.wait()
        except (grpc.RpcError, asyncio.InvalidStateError):
            call.cancel()

    async def _watch_pulse(self, call: Any) -> None:
        """End a session whose node is stopped or out of reach."""
        if self._pulse is not None:
            await self._pulse.until_silent()
            logger.warning("node %s answers no pings", self.node.id.name)
            call.cancel()

    async def _watch(self, call: Any) -> None:
        """End a session whose node says nothing and does not answer."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            silent_for = self._clock() - (self._heard_at or 0.0)
            if silent_for < self._probe_after:
                continue
            is_idle = not self._listener.owes_tokens(self)
            if is_idle and silent_for < IDLE_PATIENCE * self._probe_after:
                continue
            try:
                await self._stub.Describe(pb.DescribeRequest(), timeout=self._probe_timeout)
            except grpc.RpcError:
                logger.warning("node %s does not answer", self.node.id.name)
                call.cancel()
                return
            self._heard_at = self._clock()


def _decoded(message: pb.TokenDelta) -> TokenDelta:
    """A delta that makes no sense ends its sequence, not the session."""
    try:
        return decode_delta(message)
    except InvalidRequest as error:
        logger.error("a node sent an invalid delta: %s", error.message)
        return TokenDelta(
            sequence_id=message.sequence_id, error=InternalError("A node sent nonsense.")
        )


def _reason(error: BaseException) -> str:
    if isinstance(error, grpc.RpcError):
        return f"its address does not answer ({error.code().name})"
    if isinstance(error, ServingError):
        return error.message
    return f"it gave no welcome within {WELCOME_SECONDS:g} s"
