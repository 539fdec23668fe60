"""What a decode node answers to who asks how fast KV comes: one at a time, and only when idle."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch

from cluster.errors import DeadlineExceeded, NodeUnavailable, Overloaded
from cluster.node import Incarnation, NodeId, NodeName, NodeState
from cluster.proto import node_pb2 as pb
from decode_node import measuring
from decode_node.measured_source import Measured
from decode_node.measuring import NUM_HANDOFFS, HandoffMeasuring
from kv_transfer import idle
from kv_transfer.plain_copy import send_plain

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

BLOCK_BYTES, BLOCK_SIZE = 1 << 20, 16


class Prefill:
    """The other node: a channel that answers by itself. `seconds` of each hand-off."""

    def __init__(self) -> None:
        self.source: Source
        self.seconds = iter((9.0, 1.0, 3.0, 2.0, 2.0, 2.0))
        self.num_tokens: list[int] = []
        self.sends = True
        self.is_closed = False

    def unary_unary(self, path: str, **_: Any) -> Any:
        return {"SendScratch": self.scratch, "SendPlain": self.plain}.get(path.rpartition("/")[2])

    async def close(self) -> None:
        self.is_closed = True

    async def scratch(self, request: pb.SendScratchRequest, timeout: float) -> None:
        self.num_tokens.append(len(request.sequence.prompt_token_ids))
        if self.sends:
            (measured,) = self.source.expected.values()
            measured.num_blocks = self.num_tokens[-1] // BLOCK_SIZE
            measured.done.set_result(next(self.seconds))

    async def plain(self, request: pb.SendPlainRequest) -> pb.SendPlainReply:
        rate = await asyncio.to_thread(send_plain, request.host, request.port, request.nonce)
        return pb.SendPlainReply(bytes_per_second=rate)


class Source:
    def __init__(self) -> None:
        self.num_spare = 10
        self.expected: dict[str, Measured] = {}

    def expect(self, sequence_id: str, max_blocks: int) -> Measured:
        done: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        return self.expected.setdefault(sequence_id, Measured(max_blocks, done))

    def forget(self, sequence_id: str) -> None:
        del self.expected[sequence_id]

    async def num_spare_blocks(self) -> int:
        return self.num_spare


class Bench:
    def __init__(self) -> None:
        self.is_idle = True
        self.source, self.prefill = Source(), Prefill()
        self.prefill.source = self.source
        self.cancelled: list[str] = []
        pool = SimpleNamespace(
            num_layers=2, unit_bytes=BLOCK_BYTES // 2, device=torch.device("cpu")
        )
        config = SimpleNamespace(kv_host="127.0.0.1")
        session = SimpleNamespace(transport_name="tcp", sender_slots=[])
        receiver = SimpleNamespace(
            node_id=NodeId(NodeName("d0"), Incarnation(1)),
            agent=SimpleNamespace(pool=pool, config=config),
            session_with=lambda name: session if name == "p0" else None,
            cancel=self.cancelled.append,
        )
        self.member = SimpleNamespace(
            state=NodeState.READY, info=SimpleNamespace(grpc_address="127.0.0.1:1")
        )
        self.service = HandoffMeasuring(
            cast("Any", self.source),
            cast("Any", receiver),
            block_size=BLOCK_SIZE,
            is_idle=lambda: self.is_idle,
            open_channel=lambda address: cast("Any", self.prefill),
        )
        self.service.bind(cast("Any", self.member))

    async def measure(self) -> pb.MeasureHandoffReply:
        asked = pb.MeasureHandoffRequest(name="p0", address="p0:1")
        return await self.service.MeasureHandoff(asked, None)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle, "IDLE_SECONDS", 0.02)


def run(body: Callable[[Bench], Coroutine[Any, Any, None]]) -> None:
    async def scenario() -> None:
        bench = Bench()
        await body(bench)
        assert bench.source.expected == {}
        assert bench.prefill.is_closed

    asyncio.run(scenario())


def test_the_median_of_some_hand_offs_without_the_first_beside_a_plain_copy() -> None:
    async def body(bench: Bench) -> None:
        reply = await bench.measure()
        assert bench.prefill.num_tokens == [5 * BLOCK_SIZE] * NUM_HANDOFFS, "half of the spare"
        assert (reply.transport, reply.device) == ("tcp", "cpu")
        assert (reply.num_bytes, reply.seconds) == (5 * BLOCK_BYTES, 2.0)
        assert reply.reference == "plain socket"
        assert reply.reference_bytes_per_second > 0

    run(body)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(measuring.MAX_BYTES, "cpu", 3 * BLOCK_BYTES)

    async def body(bench: Bench) -> None:
        bench.source.num_spare = 1000
        assert (await bench.measure()).num_bytes == 3 * BLOCK_BYTES

    run(body)


def test_only_one_is_measured_at_a_time_and_time_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measuring, "LIMIT_SECONDS", 0.1)

    async def body(bench: Bench) -> None:
        bench.prefill.sends = False
        first = asyncio.create_task(bench.measure())
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await bench.measure()
        with pytest.raises(DeadlineExceeded):
            await first
        assert len(bench.cancelled) == 1, "what may still come is not wanted"
        bench.prefill.sends = True
        monkeypatch.setattr(measuring, "LIMIT_SECONDS", 25.0)
        assert (await bench.measure()).num_bytes > 0

    run(body)


def busy(bench: Bench) -> None:
    bench.is_idle = False


def full(bench: Bench) -> None:
    bench.source.num_spare = 1


def draining(bench: Bench) -> None:
    bench.member.state = NodeState.DRAINING


@pytest.mark.parametrize(
    ("make", "error", "reason"),
    [
        (busy, Overloaded, "busy"),
        (full, Overloaded, "no_blocks"),
        (draining, NodeUnavailable, "not_ready"),
    ],
)
def test_a_node_that_has_no_room_or_time_refuses(
    make: Callable[[Bench], None], error: type[NodeUnavailable], reason: str
) -> None:
    async def body(bench: Bench) -> None:
        make(bench)
        with pytest.raises(error) as refused:
            await bench.measure()
        assert refused.value.reason == reason
        assert bench.prefill.num_tokens == []

    run(body)
