"""How long after a cancel both nodes have everything back.

    python -m benchmarks.abort [--repeats 20] [--burst 32] [--write]

Real processes: `baton serve` with one prefill and one decode node on this machine's CPU. This
program is a second gateway of theirs: it submits a long prompt, cancels it in a given phase on
both nodes, as a gateway does whose client has left, and asks both again and again until free +
cached blocks are all there are, no sequence, lease or transfer is left, and every staging slot is
free. The floor is the same question when nothing runs.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import secrets
import statistics
import time
import urllib.request
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import grpc.aio
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.command import parser_of, publish
from benchmarks.serve_process import ServeProcess
from cluster.codec import PROTOCOL_VERSION, encode_handoff, encode_sequence
from cluster.node import Incarnation, NodeId, NodeName
from cluster.proto import node_pb2 as pb
from cluster.proto import node_pb2_grpc
from cluster.request import Handoff, SamplingParams, SequenceRequest
from cluster.rpc import open_channel
from gateway.admin.token_file import read_admin_token

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

GATEWAY = "benchmark-of-aborts"
MAX_SECONDS = 30.0
NUM_TOKENS_OUT = 200
PHASES = (
    "queued",
    "reserved on the decode node",
    "any moment before the first token",
    "first token",
    "started on the decode node",
    "after 5 tokens",
)


@dataclass
class Node:
    """One node, and this program's session with it."""

    id: NodeId
    address: str
    metrics_url: str
    stub: Any
    session: Any
    deltas: list[pb.TokenDelta] = field(default_factory=list)
    heard: asyncio.Event = field(default_factory=asyncio.Event)

    async def listen(self) -> None:
        while (frame := await self.session.read()) is not grpc.aio.EOF:
            self.deltas += frame.step.deltas
            self.heard.set()

    async def send(self, **frame: Any) -> None:
        await self.session.write(pb.GatewayFrame(**frame))

    async def holds_nothing(self) -> bool:
        reply = await self.stub.Inspect(pb.InspectRequest())
        load = reply.load
        is_whole = load.num_free_blocks == load.num_blocks and not load.num_quarantined_blocks
        return is_whole and not (reply.sequences or reply.leases or load.num_transfers)

    def has_all_slots(self) -> bool:
        with urllib.request.urlopen(self.metrics_url, timeout=5) as response:
            text = response.read().decode()
        taken = [
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == "baton_kv_staging_slots" and sample.labels["state"] == "taken"
        ]
        return taken == [0.0]


@dataclass(frozen=True)
class Took:
    """Seconds from a cancel until this node had everything back."""

    prefill: float
    decode: float


@dataclass
class Pair:
    prefill: Node
    decode: Node
    numbers: random.Random
    num_prompt_tokens: int
    first_token_seconds: float = 0.0

    @property
    def nodes(self) -> tuple[Node, Node]:
        return self.prefill, self.decode

    async def submit(self) -> str:
        name = secrets.token_hex(8)
        prompt = [self.numbers.randrange(10, 2000) for _ in range(self.num_prompt_tokens)]
        request = SequenceRequest(
            sequence_id=name,
            request_id=name,
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(max_tokens=NUM_TOKENS_OUT, seed=0, ignore_eos=True),
        )
        handoff = Handoff(
            transfer_id=secrets.token_bytes(16),
            attempt=1,
            decode=self.decode.id,
            decode_address=self.decode.address,
            gateway_id=GATEWAY,
        )
        submit = pb.Submit(sequence=encode_sequence(request), handoff=encode_handoff(handoff))
        await self.prefill.send(submit=submit)
        return name

    async def cancel(self, name: str) -> None:
        for node in self.nodes:
            await node.send(cancel=pb.Cancel(sequence_id=name))

    async def until_phase(self, phase: str, name: str) -> None:
        if phase == "queued":
            return
        if phase == "reserved on the decode node":
            while not any(s.sequence_id == name for s in await _sequences(self.decode)):
                pass
        elif phase == "any moment before the first token":
            await asyncio.sleep(self.numbers.uniform(0.0, self.first_token_seconds))
        elif phase == "first token":
            await _until_deltas(self.prefill, name, 1)
        else:
            await _until_deltas(self.decode, name, 1 if phase.startswith("started") else 6)

    async def whole_after(self) -> Took:
        """Seconds from now until each node has all blocks and slots, as far as asking shows."""
        began = time.perf_counter()

        async def whole(node: Node) -> float:
            async with asyncio.timeout(MAX_SECONDS):
                while not await node.holds_nothing():
                    pass
                while not await asyncio.to_thread(node.has_all_slots):
                    pass
            return time.perf_counter() - began

        prefill, decode = await asyncio.gather(whole(self.prefill), whole(self.decode))
        return Took(prefill, decode)


async def _sequences(node: Node) -> Sequence[pb.SequenceInfo]:
    reply: pb.InspectReply = await node.stub.Inspect(pb.InspectRequest())
    return reply.sequences


async def _until_deltas(node: Node, name: str, count: int) -> None:
    async with asyncio.timeout(MAX_SECONDS):
        while sum(delta.sequence_id == name for delta in node.deltas) < count:
            node.heard.clear()
            await node.heard.wait()


async def measure(pair: Pair, repeats: int, burst: int) -> dict[str, list[Took]]:
    """Seconds until whole, by phase. The first hand-off pairs the nodes and is not counted."""
    await warm_up(pair)
    took: dict[str, list[Took]] = {}
    took["nothing runs (floor)"] = [await pair.whole_after() for _ in range(repeats)]
    for phase in PHASES:
        took[phase] = []
        for _ in range(repeats):
            name = await pair.submit()
            await pair.until_phase(phase, name)
            await pair.cancel(name)
            took[phase].append(await pair.whole_after())
    label = f"{burst} at once, any moment"
    took[label] = []
    for _ in range(max(1, repeats // 4)):
        names = [await pair.submit() for _ in range(burst)]
        await asyncio.sleep(pair.numbers.uniform(0.0, 4 * pair.first_token_seconds))
        for name in names:
            await pair.cancel(name)
        took[label].append(await pair.whole_after())
    return took


async def warm_up(pair: Pair) -> None:
    """Connects the nodes, and times the first token of a lone prompt."""
    for _ in range(3):
        began = time.perf_counter()
        name = await pair.submit()
        await _until_deltas(pair.prefill, name, 1)
        pair.first_token_seconds = time.perf_counter() - began
        await _until_deltas(pair.decode, name, 6)
        await pair.cancel(name)
        await pair.whole_after()


async def _connect(stack: AsyncExitStack, view: dict[str, Any]) -> Node:
    channel = await stack.enter_async_context(open_channel(view["grpc_address"]))
    stub = node_pb2_grpc.NodeStub(channel)  # type: ignore[no-untyped-call]
    session = stub.Session()
    hello = pb.GatewayHello(gateway_id=GATEWAY, protocol_version=PROTOCOL_VERSION)
    await session.write(pb.GatewayFrame(hello=hello))
    await session.read()
    node_id = NodeId(NodeName(view["name"]), Incarnation(int(view["incarnation"])))
    url = f"http://{view['metrics_address']}/metrics"
    return Node(node_id, view["grpc_address"], url, stub, session)


def _nodes(serve: ServeProcess) -> dict[str, dict[str, Any]]:
    where = urlsplit(serve.admin_url)
    host, port = where.hostname or "", where.port or 0
    while (
        token := read_admin_token(host, port)
    ) is None:  # written a moment after the first answer
        time.sleep(0.05)
    request = urllib.request.Request(
        f"{serve.admin_url}/admin/v1/nodes", headers={"authorization": f"Bearer {token}"}
    )
    with urllib.request.urlopen(request, timeout=10) as response:
        listed = json.load(response)
    views = listed["nodes"] if isinstance(listed, dict) else listed
    return {view["role"]: view for view in views}


async def _run(
    serve: ServeProcess, arguments: argparse.Namespace
) -> tuple[dict[str, list[Took]], Pair]:
    views = _nodes(serve)
    async with AsyncExitStack() as stack:
        prefill = await _connect(stack, views["prefill"])
        decode = await _connect(stack, views["decode"])
        listening = [asyncio.create_task(node.listen()) for node in (prefill, decode)]
        most = int(views["decode"]["max_model_len"]) - NUM_TOKENS_OUT - 1
        pair = Pair(prefill, decode, random.Random(0), min(arguments.prompt_tokens, most))
        try:
            return await measure(pair, arguments.repeats, arguments.burst), pair
        finally:
            for node in pair.nodes:
                await node.session.done_writing()
            await asyncio.wait(listening)


def table(took: dict[str, list[Took]]) -> str:
    lines = [
        "| cancelled | prefill node, median / longest (ms) | decode node | both, longest | n |"
    ]
    lines.append("|---|---:|---:|---:|---:|")
    for phase, each in took.items():
        cells = [_cell([one.prefill for one in each]), _cell([one.decode for one in each])]
        longest = 1000 * max(max(one.prefill, one.decode) for one in each)
        lines.append(f"| {phase} | {' | '.join(cells)} | {longest:.0f} | {len(each)} |")
    return "\n".join(lines)


def _cell(seconds: Sequence[float]) -> str:
    return f"{1000 * statistics.median(seconds):.0f} / {1000 * max(seconds):.0f}"


def main() -> None:
    parser = parser_of("abort", __doc__)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--burst", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=1500)
    arguments = parser.parse_args()
    with ServeProcess() as serve:
        serve.wait_until_ready()
        took, pair = asyncio.run(_run(serve, arguments))
    print(table(took))
    if arguments.write:
        facts = [
            f"prompts of {pair.num_prompt_tokens} tokens; alone, the first token came after "
            f"{1000 * pair.first_token_seconds:.0f} ms. A step that runs, here of up to 512 "
            "tokens, keeps its blocks to its end",
            f"load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
        ]
        title = "From a cancel until both nodes have all of it back"
        publish("abort", "abort", title, table(took), facts)


if __name__ == "__main__":
    main()
