"""A prefill and a decode node in one process, and the gateway that speaks to both.

Everything but the wire under the KV is what a cluster runs: engines, both nodes as their programs
put them together, gRPC on loopback. The KV goes over the in-process transport. No Redis listens,
which a node lives with.
"""

from __future__ import annotations

import asyncio
import secrets
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import grpc.aio
from prometheus_client import CollectorRegistry

from cluster.codec import PROTOCOL_VERSION, encode_handoff, encode_sequence
from cluster.delta_codec import decode_delta
from cluster.member import Member
from cluster.node import NodeId, NodeName, NodeRole, new_incarnation
from cluster.node_stores import NodeStores
from cluster.proto import node_pb2 as pb
from cluster.proto import node_pb2_grpc
from cluster.request import (
    Handoff,
    PrefixHolder,
    SamplingParams,
    SequenceRequest,
    TokenDelta,
    TokenLogprobs,
)
from cluster.rpc import bind, create_server, open_channel
from cluster.session_hub import SessionHub
from decode_node.node import DecodeNode
from kv_transfer.agent import TransferAgent
from kv_transfer.config import KVTransferConfig
from kv_transfer.transports.loopback import LoopbackNetwork, LoopbackTransport
from node_parts.wiring import NodeParts
from prefill_node.node import PrefillNode
from tests.kv_twins import until
from tests.node_doubles import check_all_free

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from cluster.errors import ServingError
    from cluster.request import FinishReason
    from engine.engine import Engine

GATEWAY = "gateway-1"
NO_REDIS = "redis://127.0.0.1:1"
ANSWER_SECONDS = 90.0
# Small, so that a prompt of a few blocks takes several frames.
SLOT_BYTES = 1 << 16


def make_request(
    prompt: Sequence[int], sampling: SamplingParams, *, salt: bytes = b""
) -> SequenceRequest:
    name = secrets.token_hex(8)
    return SequenceRequest(
        sequence_id=name,
        request_id=name,
        prompt_token_ids=tuple(prompt),
        sampling=sampling,
        cache_salt=salt,
    )


@dataclass
class Answer:
    """What one node or both said of one sequence. The two streams are not ordered with each
    other, so each node's deltas are kept apart."""

    by_prefill: list[TokenDelta] = field(default_factory=list)
    by_decode: list[TokenDelta] = field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        return [token for delta in self._deltas for token in delta.token_ids]

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        return [entry for delta in self._deltas for entry in delta.logprobs]

    @property
    def num_cached_tokens(self) -> int:
        """As the node says that computed the prompt."""
        return self._deltas[0].num_cached_tokens or 0

    @property
    def finish_reasons(self) -> list[FinishReason]:
        return [d.finish_reason for d in self._deltas if d.finish_reason is not None]

    @property
    def error(self) -> ServingError | None:
        return next((delta.error for delta in self._deltas if delta.error is not None), None)

    @property
    def was_handed_off(self) -> bool:
        """Both nodes said so."""
        left = any(delta.handed_off for delta in self.by_prefill)
        return left and any(delta.started for delta in self.by_decode)

    def is_complete(self, *, is_split: bool) -> bool:
        """Nothing more comes. Of a split one that needed no decode node, its end is enough."""
        if self.error is not None:
            return True
        ended_there = any(delta.finish_reason is not None for delta in self.by_decode)
        ended_here = any(delta.finish_reason is not None for delta in self.by_prefill)
        return ended_here or (ended_there and (self.was_handed_off or not is_split))

    @property
    def _deltas(self) -> list[TokenDelta]:
        return self.by_prefill + self.by_decode


@dataclass
class ServedNode:
    """A node behind its port, and the gateway's session with it."""

    node: PrefillNode | DecodeNode
    agent: TransferAgent
    address: str
    is_idle: Callable[[], bool]
    session: grpc.aio.StreamStreamCall

    @property
    def num_bytes_moved(self) -> int:
        return sum(self.agent.stats.bytes_by_transport.values())

    async def submit(self, request: SequenceRequest, handoff: Handoff | None) -> None:
        submit = pb.Submit(sequence=encode_sequence(request))
        if handoff is not None:
            submit.handoff.CopyFrom(encode_handoff(handoff))
        await self.session.write(pb.GatewayFrame(submit=submit))

    async def check_nothing_held(self) -> None:
        """Wait for the last send to end, and for copies to and from host memory; then no block may
        have an owner."""
        await until(self.is_idle)
        host = self.node.parts.engine.block_manager.host
        await until(lambda: host is None or host.is_settled)
        await check_all_free(self.node.parts.loop, self.node.parts.engine.block_manager)
        self.agent.staging.check_integrity()
        assert self.agent.staging.num_free == self.agent.staging.num_slots


@dataclass
class SplitPair:
    prefill: ServedNode
    decode: ServedNode
    answers: dict[str, Answer]
    heard: asyncio.Condition
    failures: list[BaseException]  # fatal ones, of either node

    async def split(
        self, requests: Sequence[SequenceRequest], *, num_tokens_held: int = 0
    ) -> list[Answer]:
        """All at once: the prompts on the prefill node, the rest on the decode node, of which the
        gateway believes that it has the first `num_tokens_held` tokens cached."""
        for request in requests:
            await self.submit_split(request, num_tokens_held=num_tokens_held)
        return await self._answers_to(requests, is_split=True)

    async def submit_split(self, request: SequenceRequest, *, num_tokens_held: int = 0) -> None:
        """The same of one request, without waiting for its answer."""
        holder = PrefixHolder(self.decode.node.info.id, self.decode.address, num_tokens_held)
        handoff = Handoff(
            transfer_id=secrets.token_bytes(16),
            attempt=1,
            decode=self.decode.node.info.id,
            decode_address=self.decode.address,
            gateway_id=GATEWAY,
            holder=holder if num_tokens_held else None,
        )
        await self.prefill.submit(request, handoff)

    async def alone(self, requests: Sequence[SequenceRequest]) -> list[Answer]:
        """All at once, all of it on the decode node."""
        for request in requests:
            await self.decode.submit(request, None)
        return await self._answers_to(requests, is_split=False)

    async def warm(
        self, prefill: Sequence[SequenceRequest], decode: Sequence[SequenceRequest]
    ) -> None:
        """Compute these prompts on these nodes, each on its own; nothing is handed off."""
        await self.split([_of_one_token(request) for request in prefill])
        await self.alone([_of_one_token(request) for request in decode])
        await self.check_nothing_held()

    async def check_nothing_held(self) -> None:
        await self.prefill.check_nothing_held()
        await self.decode.check_nothing_held()

    async def _answers_to(
        self, requests: Sequence[SequenceRequest], *, is_split: bool
    ) -> list[Answer]:
        wanted = [self.answers.setdefault(r.sequence_id, Answer()) for r in requests]
        async with asyncio.timeout(ANSWER_SECONDS), self.heard:
            await self.heard.wait_for(
                lambda: all(answer.is_complete(is_split=is_split) for answer in wanted)
            )
        for answer in wanted:
            if answer.error is not None:
                raise answer.error
        return wanted


@asynccontextmanager
async def split_pair(
    prefill_engine: Engine, decode_engine: Engine, *, fetch_prefixes: bool = False
) -> AsyncIterator[SplitPair]:
    """Both nodes with their gateway connected. At the end both must hold nothing."""
    network = LoopbackNetwork()
    answers: dict[str, Answer] = {}
    heard = asyncio.Condition()
    failures: list[BaseException] = []

    def by_prefill(answer: Answer) -> list[TokenDelta]:
        return answer.by_prefill

    def by_decode(answer: Answer) -> list[TokenDelta]:
        return answer.by_decode

    async with AsyncExitStack() as stack:
        served = []
        for role, node_type, name, engine, part in (
            (NodeRole.DECODE, DecodeNode, "d0", decode_engine, by_decode),
            (NodeRole.PREFILL, PrefillNode, "p0", prefill_engine, by_prefill),
        ):
            agent = _agent(engine, network, fetch_prefixes)
            node_id = NodeId(NodeName(name), new_incarnation())
            hub = SessionHub()
            parts = NodeParts(role, engine, agent, hub, node_id, on_fatal=failures.append)
            node = node_type(parts)
            hear = _Hearing(answers, heard, part)
            served.append(await stack.enter_async_context(_serve(node, agent, hear)))
        decode, prefill = served
        pair = SplitPair(prefill, decode, answers, heard, failures)
        yield pair
        await pair.check_nothing_held()
    assert failures == []


@dataclass(frozen=True)
class _Hearing:
    """Puts what one node says where the tests look."""

    answers: dict[str, Answer]
    heard: asyncio.Condition
    part: Callable[[Answer], list[TokenDelta]]

    async def listen(self, session: grpc.aio.StreamStreamCall) -> None:
        while (frame := await session.read()) is not grpc.aio.EOF:
            for message in frame.step.deltas:
                delta = decode_delta(message)
                self.part(self.answers.setdefault(delta.sequence_id, Answer())).append(delta)
            async with self.heard:
                self.heard.notify_all()


def _agent(engine: Engine, network: LoopbackNetwork, fetch_prefixes: bool) -> TransferAgent:
    config = KVTransferConfig(
        kv_port=0,
        staging_slot_bytes=SLOT_BYTES,
        num_staging_slots=4,
        fetch_prefixes=fetch_prefixes,
    )
    return TransferAgent(engine.kv_pools, config, LoopbackTransport(network))


@asynccontextmanager
async def _serve(
    node: PrefillNode | DecodeNode, agent: TransferAgent, hearing: _Hearing
) -> AsyncIterator[ServedNode]:
    """As `run_node` does, in its order."""
    stores = NodeStores(NO_REDIS, CollectorRegistry())
    sources = node.sources(on_replaced=lambda: None)
    member = Member(node.info, stores.registry, stores.index, sources, node.parts.hub)
    server = create_server()
    node.add_services(server, member)
    await node.start(member)
    address = f"127.0.0.1:{bind(server, '127.0.0.1', 0)}"
    await server.start()
    member.start(address, "127.0.0.1:1")
    async with open_channel(address) as channel:
        session = node_pb2_grpc.NodeStub(channel).Session()  # type: ignore[no-untyped-call]
        hello = pb.GatewayHello(gateway_id=GATEWAY, protocol_version=PROTOCOL_VERSION)
        await session.write(pb.GatewayFrame(hello=hello))
        welcome = await session.read()
        assert welcome.WhichOneof("frame") == "welcome"
        listening = asyncio.create_task(hearing.listen(session))
        try:
            yield ServedNode(node, agent, address, sources.is_idle, session)
        finally:
            await session.done_writing()
            await listening
            await member.stop()
            node.parts.hub.close_all()
            await server.stop(None)
            await node.close()
            await stores.close()


def _of_one_token(request: SequenceRequest) -> SequenceRequest:
    name = secrets.token_hex(8)
    sampling = replace(request.sampling, max_tokens=1, min_tokens=0)
    return replace(request, sequence_id=name, request_id=name, sampling=sampling)
