"""Nodes for gateway tests: real gRPC servers that speak the node protocol and echo the prompt.

A test double of a peer process: no model, no KV. The prefill node sends the first token, tells
its decode node (a Python call instead of a transfer) and says `handed_off`; the decode node says
`started` and streams the rest. Gates let a test stop at any of these points.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cluster.codec import encode_description, encode_load
from cluster.errors import NodeUnavailable, TransferFailed
from cluster.message_size import message_limit
from cluster.node import (
    NodeId,
    NodeInfo,
    NodeLoad,
    NodeName,
    NodeRole,
    NodeState,
    new_incarnation,
)
from cluster.node_service import NodeService
from cluster.proto import node_pb2 as pb
from cluster.proto import node_pb2_grpc
from cluster.request import (
    FinishReason,
    Handoff,
    KVLoadFailurePolicy,
    SequenceRequest,
    TokenDelta,
    TokenLogprobs,
)
from cluster.rpc import bind, create_server
from cluster.session_hub import SessionHub

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.errors import ServingError

EOS = 1  # "<eos>" of tests.gateway.model_folder


def opened() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


@dataclass(slots=True)
class Gates:
    """Each is passed once per sequence, and stands open unless a test closes it."""

    first_token: asyncio.Event = field(default_factory=opened)
    hand_off: asyncio.Event = field(default_factory=opened)
    start: asyncio.Event = field(default_factory=opened)
    tokens: asyncio.Event = field(default_factory=opened)  # passed before each later token


class FakeNode:
    """The `Handler` of its own server. Use inside a running event loop."""

    def __init__(
        self,
        role: NodeRole,
        name: str,
        *,
        peers: dict[str, FakeNode],
        step_seconds: float = 0.0,
        compatibility_hash: str = "fake",
        max_model_len: int = 512,
        transports: tuple[str, ...] = ("loopback",),
        model_name: str = "org/test-model",
    ) -> None:
        self.gates = Gates()
        self.step_seconds = step_seconds
        self.error: ServingError | None = None  # ends every sequence here instead of tokens
        self.unreachable: set[str] = set()  # decode nodes that no KV reaches from here
        self.submitted: dict[str, SequenceRequest] = {}
        self.refused: list[str] = []
        self.handoffs: list[Handoff] = []
        self.cancelled: list[str] = []
        self.asked_about: list[str] = []
        self.num_cache_resets = 0
        self.on_cancel: Callable[[str], None] = lambda _: None
        self.answers_orphans = True
        self.info = NodeInfo(
            id=NodeId(NodeName(name), new_incarnation()),
            role=role,
            state=NodeState.READY,
            grpc_address="",
            metrics_address="",
            model_name=model_name,
            compatibility_hash=compatibility_hash,
            block_size=16,
            max_model_len=max_model_len,
            transports=transports,
            load=NodeLoad(num_blocks=100_000, num_free_blocks=100_000),
        )
        self.hub = SessionHub(clock=lambda: 0.0)  # no gateway is given up for its silence
        self._peers = peers
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._server = create_server(message_limit(max_model_len))
        service = NodeService(self, self.hub, self)
        node_pb2_grpc.add_NodeServicer_to_server(  # type: ignore[no-untyped-call]
            service, self._server
        )
        peers[name] = self

    async def start(self, port: int = 0) -> NodeInfo:
        port = bind(self._server, "127.0.0.1", port)
        await self._server.start()
        self.info = replace(self.info, grpc_address=f"127.0.0.1:{port}")
        return self.info

    async def kill(self) -> None:
        """As `kill -9`: streams break, nothing is said."""
        await self._server.stop(None)
        for task in self._tasks.values():
            task.cancel()

    def move_to(self, state: NodeState) -> None:
        """As a member does, at an order or SIGTERM: gateways are told."""
        self.info = replace(self.info, state=state)
        self.hub.tell(state)

    async def leave(self) -> None:
        """As after SIGTERM, when nothing runs here any more: the streams end in order."""
        self.hub.close_all()
        await self._server.stop(1.0)

    @property
    def is_idle(self) -> bool:
        return not self._tasks

    # ---- Handler -------------------------------------------------------------------------

    def description(self) -> pb.NodeDescription:
        return encode_description(self.info, version="test")

    def submit(self, gateway_id: str, sequence: SequenceRequest, handoff: Handoff | None) -> None:
        if self.info.state is not NodeState.READY:
            self.refused.append(sequence.sequence_id)
            raise NodeUnavailable("This node takes no new work.", reason="not_ready")
        self.submitted[sequence.sequence_id] = sequence
        if handoff is None:
            self._spawn(sequence, self._decode(gateway_id, sequence, position=0))
        else:
            self.handoffs.append(handoff)
            self._spawn(sequence, self._prefill(gateway_id, sequence, handoff))

    def cancel(self, sequence_id: str) -> None:
        self.cancelled.append(sequence_id)
        task = self._tasks.get(sequence_id)
        if task is not None:
            task.cancel()
        self.on_cancel(sequence_id)

    def orphaned(self, gateway_id: str, sequence_id: str) -> None:
        self.asked_about.append(sequence_id)
        if self.answers_orphans and sequence_id in self._tasks:
            self.hub.publish(gateway_id, [TokenDelta(sequence_id=sequence_id, started=True)])

    def gateway_gone(self, gateway_id: str) -> None:
        for task in self._tasks.values():
            task.cancel()

    def reset_prefix_cache(self) -> None:
        self.num_cache_resets += 1

    def control(self, action: pb.ControlRequest.Action) -> str:
        states = {
            pb.ControlRequest.CORDON: NodeState.CORDONED,
            pb.ControlRequest.UNCORDON: NodeState.READY,
            pb.ControlRequest.DRAIN: NodeState.DRAINING,
        }
        return states.get(action, self.info.state).value

    async def inspect(self) -> pb.InspectReply:
        lease = pb.LeaseInfo(
            transfer_id=b"\1" * 16, sequence_id="s", peer="x", state="active", num_blocks=3
        )
        return pb.InspectReply(leases=[lease], load=encode_load(self.info.load))

    # ---- the script ----------------------------------------------------------------------

    async def _prefill(self, gateway_id: str, sequence: SequenceRequest, handoff: Handoff) -> None:
        await self.gates.first_token.wait()
        if self.error is not None:
            self._say(gateway_id, TokenDelta(sequence_id=sequence.sequence_id, error=self.error))
            return
        if handoff.decode.name in self.unreachable:
            self._link_failed(gateway_id, sequence, handoff)
            return
        first = echo(sequence, 0)._replace(num_cached_tokens=min(16, _num_prompt(sequence) - 1))
        self._say(gateway_id, first)
        if first.finish_reason is not None:
            return
        await self.gates.hand_off.wait()
        decode = self._peers[handoff.decode.name]
        decode.take_over(handoff.gateway_id, sequence)
        self._say(gateway_id, TokenDelta(sequence_id=sequence.sequence_id, handed_off=True))

    def _link_failed(self, gateway_id: str, sequence: SequenceRequest, handoff: Handoff) -> None:
        """The decode node computes it all, where that is the policy."""
        if handoff.kv_load_failure_policy is KVLoadFailurePolicy.RECOMPUTE:
            self._peers[handoff.decode.name].recompute(handoff.gateway_id, sequence)
        lost = TransferFailed("The data connection broke.", reason="link_lost")
        self._say(gateway_id, TokenDelta(sequence_id=sequence.sequence_id, error=lost))

    def take_over(self, gateway_id: str, sequence: SequenceRequest) -> None:
        self.submitted[sequence.sequence_id] = sequence
        self._spawn(sequence, self._decode(gateway_id, sequence, position=1))

    def recompute(self, gateway_id: str, sequence: SequenceRequest) -> None:
        """Its gateway hears at once that this node goes on with it."""
        self.submitted[sequence.sequence_id] = sequence
        started = TokenDelta(sequence_id=sequence.sequence_id, started=True, recomputed=True)
        self._say(gateway_id, started)
        self._spawn(sequence, self._decode(gateway_id, sequence, position=0))

    async def _decode(self, gateway_id: str, sequence: SequenceRequest, position: int) -> None:
        await self.gates.start.wait()
        if self.error is not None:
            self._say(gateway_id, TokenDelta(sequence_id=sequence.sequence_id, error=self.error))
            return
        self._say(
            gateway_id,
            TokenDelta(sequence_id=sequence.sequence_id, started=True, num_cached_tokens=0),
        )
        while True:
            await asyncio.sleep(self.step_seconds)
            await self.gates.tokens.wait()
            delta = echo(sequence, position)
            self._say(gateway_id, delta)
            if delta.finish_reason is not None:
                return
            position += 1

    def _say(self, gateway_id: str, delta: TokenDelta) -> None:
        self.hub.publish(gateway_id, [delta])

    def _spawn(self, sequence: SequenceRequest, work: object) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work)  # type: ignore[arg-type]
        self._tasks[sequence.sequence_id] = task
        task.add_done_callback(lambda _: self._tasks.pop(sequence.sequence_id, None))


def _num_prompt(sequence: SequenceRequest) -> int:
    return len(sequence.prompt_token_ids)


def echo(sequence: SequenceRequest, position: int) -> TokenDelta:
    """The output token at `position`, counted from where this attempt begins: the prompt again,
    then the end token."""
    num_emitted, sampling = sequence.num_emitted_tokens, sequence.sampling
    prompt = sequence.prompt_token_ids[: _num_prompt(sequence) - num_emitted]
    position += num_emitted
    is_end = position >= len(prompt) and not sampling.ignore_eos
    token_id = EOS if is_end else prompt[position % len(prompt)]
    is_stop = is_end or token_id in sampling.stop_token_ids
    is_long = position + 1 >= sampling.max_tokens
    reason = FinishReason.STOP if is_stop else FinishReason.LENGTH if is_long else None
    logprobs: tuple[TokenLogprobs, ...] = ()
    if sampling.num_logprobs is not None:
        top = tuple((token_id + i, -0.5 - i) for i in range(sampling.num_logprobs))
        logprobs = (TokenLogprobs(-0.5, top),)
    return TokenDelta(
        sequence_id=sequence.sequence_id,
        token_ids=(token_id,),
        logprobs=logprobs,
        finish_reason=reason,
        stop_token_id=token_id if is_stop else None,
    )
