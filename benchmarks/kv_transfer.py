"""`python -m benchmarks.kv_transfer`: KV from pool to pool between two processes, over UCX.

Everything a hand-off does is in the numbers: the gRPC control stream, packing scattered blocks,
digests on both sides, the wire, scattering, and the call that starts the sequence. No engine
runs. Both processes are on one machine, so they share a clock.

1. whole    every block of the prompt is computed already: GB/s from the first frame asked for
            until the sequence starts.
2. tail     all but the last chunk was sent while it was computed; the time from the first token
            until the sequence starts is what a request waits for. Swept over chunk sizes.
3. empty    the decode node holds every block: the control path alone.

    python -m benchmarks.kv_transfer --source cuda:0 --target cuda:1
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import secrets
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from cluster.errors import ServingError

BLOCK_SIZE = 16
COMPATIBLE = Compatibility(1, "benchmark")
MIB = 1 << 20


@dataclass(frozen=True)
class Blocks:
    block_ids: tuple[int, ...]
    num_held_blocks: int


class BenchmarkSource:
    """Blocks in a scrambled order; tells when each sequence starts, and ends it at once."""

    def __init__(self, num_blocks: int, started: Connection) -> None:
        self._free = torch.randperm(num_blocks).tolist()
        self._owned: dict[str, tuple[int, ...]] = {}
        self._started = started

    async def reserve(self, request: SequenceRequest, gateway_id: str) -> Blocks:
        num_blocks = -(-len(request.prompt_token_ids) // BLOCK_SIZE)
        taken = tuple(self._free[:num_blocks])
        del self._free[:num_blocks]
        self._owned[request.sequence_id] = taken
        return Blocks(taken, num_blocks if gateway_id == "all held" else 0)

    async def start(self, sequence_id: str, first_token_id: int) -> None:
        self._started.send(time.perf_counter())
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
class BenchmarkOwner:
    """What the sender reports, as futures by sequence."""

    free: dict[str, asyncio.Future[None]] = field(default_factory=dict)
    error: ServingError | None = None

    def on_committed(self, sequence_id: str) -> None:
        """`start` is what is timed."""

    def on_failed(self, sequence_id: str, error: ServingError) -> None:
        self.error = error

    def on_sources_free(self, sequence_id: str) -> None:
        if self.error is not None:
            self.free[sequence_id].set_exception(self.error)
        else:
            self.free[sequence_id].set_result(None)


def make_pool(arguments: argparse.Namespace, device: str) -> torch.Tensor:
    shape = (arguments.num_layers, arguments.num_blocks, arguments.unit_kib * 1024)
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=torch.device(device))


def make_config(arguments: argparse.Namespace) -> KVTransferConfig:
    slot_mib = arguments.slot_mib
    return KVTransferConfig(
        kv_port=0,
        ucx_tls=arguments.tls,
        staging_slot_bytes=None if slot_mib is None else int(slot_mib * MIB),
        num_staging_slots=arguments.num_slots,
        require_transport=arguments.require_transport,
    )


def decode_process(arguments: argparse.Namespace, where: Connection, started: Connection) -> None:
    async def main() -> None:
        pool = make_pool(arguments, arguments.target)
        agent = TransferAgent.create((pool,), make_config(arguments))
        node_id = NodeId(NodeName("decode"), new_incarnation())
        receiver = KVReceiver(
            node_id=node_id,
            compatibility=COMPATIBLE,
            agent=agent,
            source=BenchmarkSource(arguments.num_blocks, started),
        )
        server = create_server()
        node_pb2_grpc.add_KvReceiverServicer_to_server(  # type: ignore[no-untyped-call]
            KvReceiverService(receiver), server
        )
        port = bind(server, "127.0.0.1", 0)
        await receiver.start()
        await server.start()
        where.send((f"127.0.0.1:{port}", node_id))
        await asyncio.to_thread(where.recv)
        await receiver.close()
        await server.stop(None)
        await agent.close()

    uvloop.run(main())


class Bench:
    """Hands prompts off and reads off when they started at the other end."""

    def __init__(
        self, arguments: argparse.Namespace, address: str, node_id: NodeId, started: Connection
    ) -> None:
        self._address = address
        self._node_id = node_id
        self._started = started
        self._owner = BenchmarkOwner()
        self._moved_before = 0
        pool = make_pool(arguments, arguments.source)
        self._table = torch.randperm(arguments.num_blocks).tolist()
        self.agent = TransferAgent.create((pool,), make_config(arguments))
        self.sender = KVSender(
            node_id=NodeId(NodeName("prefill"), new_incarnation()),
            compatibility=COMPATIBLE,
            agent=self.agent,
            block_size=BLOCK_SIZE,
            events=self._owner,
        )

    async def hand_off(self, num_blocks: int, *, num_last: int, held: bool = False) -> float:
        """Seconds from the first token until the start at the other end. All blocks but the
        last `num_last` have left before that."""
        request = make_request(num_blocks * BLOCK_SIZE)
        name = request.sequence_id
        free = self._owner.free[name] = asyncio.get_running_loop().create_future()
        handoff = Handoff(
            transfer_id=secrets.token_bytes(16),
            attempt=1,
            decode=self._node_id,
            decode_address=self._address,
            gateway_id="all held" if held else "gateway",
        )
        self.sender.open(request, handoff)
        num_early = (num_blocks - num_last) * BLOCK_SIZE
        self.sender.chunk_computed(name, num_early, self._table, None)
        await self._left((num_blocks - num_last) * self.agent.pool.num_layers)
        began = time.perf_counter()
        self.sender.chunk_computed(name, num_blocks * BLOCK_SIZE, self._table, None)
        self.sender.commit(name, 1)
        await free
        started_at = await asyncio.to_thread(self._started.recv)
        return float(started_at) - began

    async def _left(self, num_units: int) -> None:
        """Until that many units were sent since `settle`, and the link is quiet again."""
        target = self._moved_before + num_units * self.agent.pool.unit_bytes
        moved = self.agent.stats.bytes_by_transport
        while sum(moved.values()) < target:  # noqa: ASYNC110 (a counter has no event)
            await asyncio.sleep(0.0005)
        await asyncio.sleep(0.02)

    def settle(self) -> None:
        self._moved_before = sum(self.agent.stats.bytes_by_transport.values())


def make_request(num_tokens: int) -> SequenceRequest:
    name = secrets.token_hex(8)
    return SequenceRequest(
        sequence_id=name,
        request_id=name,
        prompt_token_ids=tuple(range(num_tokens)),
        sampling=SamplingParams(max_tokens=8, seed=0),
    )


async def measure(bench: Bench, arguments: argparse.Namespace, **prompt: Any) -> list[float]:
    seconds = []
    for _ in range(arguments.warmup + arguments.repeats):
        bench.settle()
        seconds.append(await bench.hand_off(**prompt))
    return sorted(seconds[arguments.warmup :])


def describe(label: str, seconds: list[float], num_bytes: int) -> str:
    median = statistics.median(seconds)
    p99 = seconds[min(len(seconds) - 1, int(0.99 * len(seconds)))]
    times = (
        f"p50 {median * 1e3:8.3f} ms   p99 {p99 * 1e3:8.3f} ms   best {seconds[0] * 1e3:8.3f} ms"
    )
    rate = f"   {num_bytes / median / 1e9:7.2f} GB/s" if num_bytes else ""
    return f"{label:<28} {num_bytes / MIB:9.2f} MiB   {times}{rate}"


async def run(arguments: argparse.Namespace, where: Connection, started: Connection) -> None:
    address, node_id = await asyncio.to_thread(where.recv)
    bench = Bench(arguments, address, node_id, started)
    await bench.sender.start()
    block_bytes = arguments.num_layers * arguments.unit_kib * 1024
    num_blocks = arguments.prompt_blocks
    empty = await measure(bench, arguments, num_blocks=num_blocks, num_last=num_blocks, held=True)
    print(f"{arguments.source} -> {arguments.target} over {bench.agent.transports_in_use}")
    print(describe("empty", empty, 0))
    for num_last in (1, 8, 32, 128):
        if num_last < num_blocks:
            tail = await measure(bench, arguments, num_blocks=num_blocks, num_last=num_last)
            label = f"tail of {num_last * BLOCK_SIZE} tokens"
            print(describe(label, tail, num_last * block_bytes))
    whole = await measure(bench, arguments, num_blocks=num_blocks, num_last=num_blocks)
    print(describe(f"whole {num_blocks * BLOCK_SIZE} tokens", whole, num_blocks * block_bytes))
    await bench.sender.close()
    await bench.agent.close()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", default="cpu", help="device of the prefill node's pool")
    parser.add_argument("--target", default="cpu", help="device of the decode node's pool")
    parser.add_argument("--num-layers", type=int, default=None)
    parser.add_argument("--unit-kib", type=int, default=None, help="one layer of one block")
    parser.add_argument("--num-blocks", type=int, default=None, help="of each pool")
    parser.add_argument("--prompt-blocks", type=int, default=None)
    parser.add_argument("--slot-mib", type=float, default=None)
    parser.add_argument("--num-slots", type=int, default=8)
    parser.add_argument("--tls", default=None, help="UCX_TLS")
    parser.add_argument("--require-transport", default="any")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    found = parser.parse_args(arguments)
    # On a GPU the KV of an 8B model and a prompt of 8192 tokens; on a CPU a small one.
    is_cpu = found.source == "cpu"
    defaults = (12, 16, 256, 64) if is_cpu else (32, 64, 1536, 512)
    names = ("num_layers", "unit_kib", "num_blocks", "prompt_blocks")
    for name, value in zip(names, defaults, strict=True):
        if getattr(found, name) is None:
            setattr(found, name, value)
    return found


def main() -> None:
    arguments = parse()
    context = multiprocessing.get_context("spawn")
    where, their_where = context.Pipe()
    started, their_started = context.Pipe()
    process = context.Process(
        target=decode_process, args=(arguments, their_where, their_started), daemon=True
    )
    process.start()
    try:
        uvloop.run(run(arguments, where, started))
    finally:
        where.send(None)
        process.join(10)


if __name__ == "__main__":
    main()
