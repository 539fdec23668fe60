"""A prefill and a decode node's halves of KV transfer in one process, without engines.

The control stream is a real grpc.aio server on loopback; the data goes over the in-process
twin unless another transport is given. Pools are small, so every test compares all bytes.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from cluster.message_size import BASE_MESSAGE_BYTES
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
from kv_transfer.transports.loopback import LoopbackNetwork, LoopbackTransport

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from cluster.errors import ServingError
    from kv_transfer.sending.sender import SenderEvents
    from kv_transfer.transports.base import Transport

NUM_LAYERS, NUM_BLOCKS, UNIT_BYTES, BLOCK_SIZE = 3, 32, 64, 4
COMPATIBLE = Compatibility(1, "same")


class ManualClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def make_pool(seed: int, *, unit_bytes: int = UNIT_BYTES) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (NUM_LAYERS, NUM_BLOCKS, unit_bytes)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def make_config(**options: object) -> KVTransferConfig:
    small = {"staging_slot_bytes": 4096, "num_staging_slots": 4, "kv_port": 0}
    return KVTransferConfig(**{**small, **options})  # type: ignore[arg-type]


def make_request(num_tokens: int, *, salt: bytes = b"") -> SequenceRequest:
    name = secrets.token_hex(4)
    return SequenceRequest(
        sequence_id=name,
        request_id=name,
        prompt_token_ids=tuple(range(num_tokens)),
        sampling=SamplingParams(max_tokens=8, seed=0),
        cache_salt=salt,
    )


@dataclass(frozen=True)
class Blocks:
    block_ids: tuple[int, ...]
    num_held_blocks: int


@dataclass
class Source:
    """Blocks from a free list; says what was done to each sequence. Checks that no block is
    given out twice and none is freed twice."""

    free: list[int]
    num_held_blocks: int = 0
    log: list[tuple[str, str]] = field(default_factory=list)
    owned: dict[str, tuple[int, ...]] = field(default_factory=dict)
    errors: dict[str, ServingError] = field(default_factory=dict)
    first_tokens: dict[str, int] = field(default_factory=dict)
    refusal: ServingError | None = None
    finishes_at_once: bool = False  # a started sequence gives its blocks back
    may_reserve: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.may_reserve.set()

    async def reserve(self, request: SequenceRequest, gateway_id: str) -> Blocks:
        await self.may_reserve.wait()
        if self.refusal is not None:
            raise self.refusal
        count = -(-len(request.prompt_token_ids) // BLOCK_SIZE)
        assert request.sequence_id not in self.owned
        taken = tuple(self.free.pop() for _ in range(count))
        self.owned[request.sequence_id] = taken
        self._note("reserved", request.sequence_id)
        return Blocks(taken, self.num_held_blocks)

    async def start(self, sequence_id: str, first_token_id: int) -> None:
        self.first_tokens[sequence_id] = first_token_id
        if self.finishes_at_once:
            self.free.extend(self.owned.pop(sequence_id))
        self._note("started", sequence_id)

    def release(self, sequence_id: str) -> None:
        self.free.extend(self.owned.pop(sequence_id))
        self._note("released", sequence_id)

    def may_recompute(self, sequence_id: str, num_good_blocks: int) -> bool:
        return False

    def recompute(self, sequence_id: str, num_good_blocks: int) -> None:
        raise AssertionError("Never allowed here.")

    def on_transfer_failed(self, sequence_id: str, error: ServingError) -> None:
        self.errors[sequence_id] = error
        self._note("failed", sequence_id)

    def on_transfer_withdrawn(self, sequence_id: str) -> None:
        self._note("withdrawn", sequence_id)

    def of(self, sequence_id: str) -> list[str]:
        return [what for what, whose in self.log if whose == sequence_id]

    def _note(self, what: str, sequence_id: str) -> None:
        self.log.append((what, sequence_id))
        self.changed.set()


@dataclass
class Owner:
    """The prefill node: collects what the sender reports."""

    log: list[tuple[str, str]] = field(default_factory=list)
    errors: dict[str, ServingError] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def on_committed(self, sequence_id: str) -> None:
        self._note("committed", sequence_id)

    def on_failed(self, sequence_id: str, error: ServingError) -> None:
        self.errors[sequence_id] = error
        self._note("failed", sequence_id)

    def on_sources_free(self, sequence_id: str) -> None:
        self._note("free", sequence_id)

    def of(self, sequence_id: str) -> list[str]:
        return [what for what, whose in self.log if whose == sequence_id]

    def _note(self, what: str, sequence_id: str) -> None:
        self.log.append((what, sequence_id))
        self.changed.set()


async def until(condition: Callable[[], bool], *, seconds: float = 10.0) -> None:
    """Let the event loop run until `condition` holds; fails after `seconds`."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 (any state may be waited for)
            await asyncio.sleep(0.001)


@dataclass
class Place:
    """Where a decode node is: all that a prefill node knows of it."""

    address: str
    node_id: NodeId


def handoff_to(decode: Place) -> Handoff:
    return Handoff(
        transfer_id=secrets.token_bytes(16),
        attempt=1,
        decode=decode.node_id,
        decode_address=decode.address,
        gateway_id="gateway",
    )


@dataclass
class DecodeSide(Place):
    receiver: KVReceiver
    source: Source
    pool: torch.Tensor
    clock: ManualClock


@dataclass
class PrefillSide:
    sender: KVSender
    owner: Owner
    pool: torch.Tensor
    clock: ManualClock

    def hand_off(self, decode: Place, request: SequenceRequest) -> Handoff:
        """Open the hand-off of `request`; returns what it was opened with."""
        handoff = handoff_to(decode)
        self.sender.open(request, handoff)
        return handoff

    def compute(self, request: SequenceRequest, block_table: list[int]) -> None:
        """The whole prompt's KV is in these blocks of the pool."""
        num_tokens = len(request.prompt_token_ids)
        self.sender.chunk_computed(request.sequence_id, num_tokens, block_table, None)


@asynccontextmanager
async def decode_side(
    transport: Transport,
    *,
    compatibility: Compatibility = COMPATIBLE,
    name: str = "d0",
    host: str = "127.0.0.1",
    port: int = 0,
    unit_bytes: int = UNIT_BYTES,
    is_decoding: Callable[[], bool] = lambda: False,
    max_message_bytes: int = BASE_MESSAGE_BYTES,
    **options: object,
) -> AsyncIterator[DecodeSide]:
    pool = make_pool(2, unit_bytes=unit_bytes)
    clock = ManualClock()
    source = Source(list(range(NUM_BLOCKS)))
    node_id = NodeId(NodeName(name), new_incarnation())
    agent = TransferAgent((pool,), make_config(**options), transport)
    receiver = KVReceiver(
        node_id=node_id,
        compatibility=compatibility,
        agent=agent,
        source=source,
        is_decoding=is_decoding,
        clock=clock,
    )
    server = create_server(max_message_bytes)
    service = KvReceiverService(receiver, max_message_bytes)
    node_pb2_grpc.add_KvReceiverServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    port = bind(server, host, port)
    await receiver.start()
    await server.start()
    try:
        yield DecodeSide(f"{host}:{port}", node_id, receiver, source, pool, clock)
    finally:
        await receiver.close()
        await server.stop(None)
        await agent.close()
        agent.staging.check_integrity()


@asynccontextmanager
async def prefill_side(
    transport: Transport,
    *,
    compatibility: Compatibility = COMPATIBLE,
    name: str = "p0",
    unit_bytes: int = UNIT_BYTES,
    events: SenderEvents | None = None,
    gives_all_back: bool = True,
    **options: object,
) -> AsyncIterator[PrefillSide]:
    """`events`: who hears of its hand-offs instead of `owner`. Afterwards no source and no slot is
    held, if it `gives_all_back`."""
    pool = make_pool(1, unit_bytes=unit_bytes)
    clock = ManualClock()
    owner = Owner()
    agent = TransferAgent((pool,), make_config(**options), transport)
    sender = KVSender(
        node_id=NodeId(NodeName(name), new_incarnation()),
        compatibility=compatibility,
        agent=agent,
        block_size=BLOCK_SIZE,
        events=events or owner,
        clock=clock,
    )
    await sender.start()
    try:
        yield PrefillSide(sender, owner, pool, clock)
    finally:
        await sender.close()
        await agent.close()
        agent.staging.check_integrity()
        if gives_all_back:
            assert sender.leases() == [], "source blocks are held for ever"
            assert agent.staging.num_free == agent.staging.num_slots
        assert all(count == 1 for count in Counter(owner.log).values())


@asynccontextmanager
async def twins(
    *,
    max_message_bytes: int = BASE_MESSAGE_BYTES,
    gives_all_back: bool = True,
    **options: Any,
) -> AsyncIterator[tuple[PrefillSide, DecodeSide]]:
    """`max_message_bytes`: of what the decode node takes. `gives_all_back`: the prefill node."""
    network = LoopbackNetwork()
    async with (
        decode_side(
            LoopbackTransport(network), max_message_bytes=max_message_bytes, **options
        ) as decode,
        prefill_side(
            LoopbackTransport(network), gives_all_back=gives_all_back, **options
        ) as prefill,
    ):
        yield prefill, decode
