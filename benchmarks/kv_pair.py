"""Two processes that hand KV off, without engines: what `benchmarks.kv_transfer` measures.

1. `Pair` starts the decode process: a pool, a receiver, its gRPC service.
2. This process is the prefill node: a pool, a sender. `hand_off` sends prompts whose KV stands in
   scattered blocks, and returns when the other process has started each of them.
3. Both run on uvloop, as nodes do, and share a clock, being on one machine.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import secrets
import sys
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch
import uvloop

from cluster.node import NodeId, NodeName, new_incarnation
from cluster.proto import node_pb2_grpc
from cluster.request import Handoff, SamplingParams, SequenceRequest
from cluster.rpc import bind, create_server
from kv_transfer.agent import TransferAgent
from kv_transfer.config import KVTransferConfig
from kv_transfer.handshake import Compatibility
from kv_transfer.receiving.kv_session import KvReceiverService
from kv_transfer.receiving.receiver import KVReceiver
from kv_transfer.sending.sender import KVSender
from kv_transfer.trace import TRACE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from multiprocessing.connection import Connection

    from cluster.errors import ServingError
    from kv_transfer.polling import Event
    from kv_transfer.receiving.block_source import BlockSource
    from kv_transfer.trace import Mark

T = TypeVar("T")
BLOCK_SIZE = 16
MIB = 1 << 20
ALL_HELD = "all held"  # a gateway whose prompts the decode process has already
_COMPATIBLE = Compatibility(1, "benchmark")


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """Shapes are those of both pools, `unit_bytes` of one layer of one block."""

    source: str
    target: str
    num_layers: int
    unit_bytes: int
    num_blocks: int
    slot_bytes: int | None
    num_slots: int | None
    ucx_tls: str | None
    require_transport: str
    takes_digests: bool = True

    @property
    def block_bytes(self) -> int:
        return self.num_layers * self.unit_bytes

    def make_pool(self, device: str) -> torch.Tensor:
        shape = (self.num_layers, self.num_blocks, self.unit_bytes)
        if device == "cpu":  # as a node's
            return torch.from_numpy(np.zeros(shape, dtype=np.uint8)).random_(0, 256)
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=torch.device(device))

    def make_agent(self, pool: torch.Tensor) -> TransferAgent:
        config = KVTransferConfig(
            kv_port=0,
            ucx_tls=self.ucx_tls,
            staging_slot_bytes=self.slot_bytes,
            require_transport=self.require_transport,  # type: ignore[arg-type]
        )
        if self.num_slots is not None:
            config = replace(config, num_staging_slots=self.num_slots)
        return TransferAgent.create((pool,), config, takes_digests=self.takes_digests)


def run_as_node(main: Coroutine[object, object, T]) -> T:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


@dataclass(frozen=True)
class _Blocks:
    block_ids: tuple[int, ...]
    num_held_blocks: int


@dataclass(frozen=True)
class Started:
    """What the decode process says of a prompt: when it could have run, and the frames' marks."""

    at: float
    marks: list[Mark]


class Listener(Protocol):
    def send(self, fact: Any) -> None: ...


class Source:
    """The blocks of a decode process; tells when each sequence starts, and ends it at once."""

    def __init__(self, block_ids: list[int], started: Listener) -> None:
        self._free = block_ids
        self._owned: dict[str, tuple[int, ...]] = {}
        self._started = started

    async def reserve(self, request: SequenceRequest, gateway_id: str) -> _Blocks:
        num_blocks = -(-len(request.prompt_token_ids) // BLOCK_SIZE)
        taken = tuple(self._free[:num_blocks])
        del self._free[:num_blocks]
        self._owned[request.sequence_id] = taken
        return _Blocks(taken, num_blocks if gateway_id == ALL_HELD else 0)

    def start(self, sequence_id: str, first_token_id: int) -> Awaitable[None]:
        at = time.perf_counter()  # a node's engine hears of it now
        return self._tell(sequence_id, at)

    async def _tell(self, sequence_id: str, at: float) -> None:
        traces = TRACE.is_on
        self._started.send(Started(at, TRACE.stop()))
        if traces:
            TRACE.start()
        self.release(sequence_id)

    def release(self, sequence_id: str) -> None:
        self._free.extend(self._owned.pop(sequence_id))

    def may_recompute(self, sequence_id: str, num_good_blocks: int) -> bool:
        return False

    def recompute(self, sequence_id: str, num_good_blocks: int) -> None:
        raise AssertionError("Never allowed here.")

    def on_transfer_failed(self, sequence_id: str, error: ServingError) -> None:
        print(f"receiver: {error.message}", file=sys.stderr)

    def on_transfer_withdrawn(self, sequence_id: str) -> None:
        """Not used here."""


@dataclass
class _Owner:
    """What the sender reports, as futures by sequence."""

    free: dict[str, asyncio.Future[None]] = field(default_factory=dict)
    error: ServingError | None = None

    def on_committed(self, sequence_id: str) -> None:
        """`start` is what is timed."""

    def on_failed(self, sequence_id: str, error: ServingError) -> None:
        self.error = error

    def on_sources_free(self, sequence_id: str) -> None:
        if self.error is not None:
            self.free.pop(sequence_id).set_exception(self.error)
        else:
            self.free.pop(sequence_id).set_result(None)


async def receive(
    options: PairOptions,
    pool: torch.Tensor,
    source: BlockSource,
    where: Connection,
    *,
    traces: bool = False,
    is_decoding: Callable[[], bool] = lambda: False,
    on_receiver: Callable[[KVReceiver], None] = lambda _: None,
) -> None:
    """Be a decode node's receiver, until told to stop by way of `where`."""
    agent = options.make_agent(pool)
    node_id = NodeId(NodeName("decode"), new_incarnation())
    receiver = KVReceiver(
        node_id=node_id,
        compatibility=_COMPATIBLE,
        agent=agent,
        source=source,
        is_decoding=is_decoding,
    )
    on_receiver(receiver)
    server = create_server()
    node_pb2_grpc.add_KvReceiverServicer_to_server(  # type: ignore[no-untyped-call]
        KvReceiverService(receiver), server
    )
    port = bind(server, "127.0.0.1", 0)
    await receiver.start()
    await server.start()
    if traces:
        TRACE.start()
    where.send((f"127.0.0.1:{port}", node_id))
    await asyncio.to_thread(where.recv)
    await receiver.close()
    await server.stop(None)
    await agent.close()


def decode_process(
    options: PairOptions, where: Connection, started: Connection, traces: bool = False
) -> None:
    pool = options.make_pool(options.target)
    source = Source(torch.randperm(options.num_blocks).tolist(), started)
    run_as_node(receive(options, pool, source, where, traces=traces))


class Pair:
    """An asynchronous context manager. `decode`: what the other process runs, with its arguments
    after `options` and the two connections."""

    def __init__(
        self,
        options: PairOptions,
        decode: Callable[..., None] = decode_process,
        *arguments: object,
    ) -> None:
        self.options = options
        context = multiprocessing.get_context("spawn")
        self._where, theirs = context.Pipe()
        self._started, their_started = context.Pipe()
        self._process = context.Process(
            target=decode, args=(options, theirs, their_started, *arguments), daemon=True
        )
        self._process.start()
        self._owner = _Owner()
        self._table = torch.randperm(options.num_blocks).tolist()
        self.agent: TransferAgent
        self.sender: KVSender

    @property
    def pid(self) -> int:
        """Of the other process."""
        return self._process.pid or 0

    async def __aenter__(self) -> Pair:
        self.agent = self.options.make_agent(self.options.make_pool(self.options.source))
        self._address, self._node_id = await asyncio.to_thread(self._where.recv)
        self.sender = KVSender(
            node_id=NodeId(NodeName("prefill"), new_incarnation()),
            compatibility=_COMPATIBLE,
            agent=self.agent,
            block_size=BLOCK_SIZE,
            events=self._owner,
        )
        await self.sender.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.sender.close()
        await self.agent.close()
        self._where.send(None)
        await asyncio.to_thread(self._process.join, 10)

    def open(self, num_blocks: int, gateway_id: str = "gateway") -> str:
        """Reserve blocks for a prompt; returns its name."""
        request = _make_request(num_blocks * BLOCK_SIZE)
        name = request.sequence_id
        self._owner.free[name] = asyncio.get_running_loop().create_future()
        handoff = Handoff(
            transfer_id=secrets.token_bytes(16),
            attempt=1,
            decode=self._node_id,
            decode_address=self._address,
            gateway_id=gateway_id,
        )
        self.sender.open(request, handoff)
        return name

    def computed(
        self, name: str, num_blocks: int, layer_end: int | None = None, done: Event | None = None
    ) -> None:
        """The layers below `layer_end`, or all, of the first blocks of a prompt, once `done` has
        happened."""
        layer_end = self.options.num_layers if layer_end is None else layer_end
        num_tokens = num_blocks * BLOCK_SIZE
        self.sender.layers_computed(name, num_tokens, self._table, layer_end, done)

    async def committed(self, names: list[str]) -> None:
        """Until all of them were started, and their sources are free again."""
        free = [self._owner.free[name] for name in names]
        for name in names:
            self.sender.commit(name, 1)
        await asyncio.gather(*free)

    async def started(self, names: list[str]) -> list[Started]:
        """As `committed`; with what the decode process says of each."""
        await self.committed(names)
        return [await asyncio.to_thread(self._started.recv) for _ in names]

    def tell(self, fact: object) -> None:
        self._started.send(fact)

    def ask(self, question: object) -> Any:
        """For a decode process that answers."""
        self._started.send(question)
        return self._started.recv()


def _make_request(num_tokens: int) -> SequenceRequest:
    name = secrets.token_hex(8)
    return SequenceRequest(
        sequence_id=name,
        request_id=name,
        prompt_token_ids=tuple(range(num_tokens)),
        sampling=SamplingParams(max_tokens=8, seed=0),
    )
