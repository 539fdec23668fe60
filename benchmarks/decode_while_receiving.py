"""`python -m benchmarks.decode_while_receiving`: what arriving KV costs those who decode.

1. A process decodes a batch on one GPU with dummy weights, as a node does, and is at the same time
   the receiver of hand-offs into other blocks of the same pool.
2. This process sends, in turns: nothing; as much as one prefill GPU can compute, layer by layer;
   as much as the link takes. The last is no load that a prefill node can make: each byte crosses
   the memory of the decoding GPU three times, which decode itself is bound by.
3. For each, the time from step to step.

    python -m benchmarks.decode_while_receiving [--write]
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from benchmarks.engine_run import EngineRun
from benchmarks.kv_pair import BLOCK_SIZE, Pair, PairOptions, Source, receive, run_as_node
from benchmarks.model_shapes import SHAPES
from benchmarks.results_file import machine_facts, write_section
from benchmarks.two_gpus import write_model_folder
from cluster.startup import StartupReport
from engine.config import EngineConfig
from engine.engine import Engine

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from multiprocessing.connection import Connection

RECEIVING_BLOCKS = 1536
# What one GPU computes at most: a prompt of 8192 tokens of the 8B shape in a little less.
PREFILL_TOKENS_PER_SECOND = 42_000


def decode_process(
    options: PairOptions, where: Connection, started: Connection, batch: int, context: int
) -> None:
    """Steps are measured while `started` asks for them: so many are sent back."""
    with TemporaryDirectory() as folder:
        write_model_folder(Path(folder), "llama-3.1-8b", options.num_layers)
        config = EngineConfig(
            model=Path(folder),
            load_format="dummy",
            device=options.target,
            max_model_len=16384,
            max_num_seqs=batch,
            enable_prefix_caching=False,
        )
        engine = Engine.create(config, progress=StartupReport(sink=lambda fact: None))
    reservation = engine.block_manager.reserve([], RECEIVING_BLOCKS * BLOCK_SIZE)
    if reservation is None:
        raise RuntimeError("the pool is too small")
    block_ids = list(reservation.block_ids)
    random.Random(0).shuffle(block_ids)
    with EngineRun(engine, seed=0) as run:
        run_as_node(_decode_and_receive(options, run, block_ids, where, started, batch, context))


async def _decode_and_receive(
    options: PairOptions,
    run: EngineRun,
    block_ids: list[int],
    where: Connection,
    started: Connection,
    batch: int,
    context: int,
) -> None:
    (pool,) = run.engine.kv_pools
    await asyncio.to_thread(run.start_decode, batch, context)
    counting = asyncio.create_task(asyncio.to_thread(_send_steps, run, started))
    await receive(options, pool, Source(block_ids, _Silent()), where)
    await counting


class _Silent:
    """Nobody asks when a sequence has started."""

    def send(self, fact: object) -> None: ...


def _send_steps(run: EngineRun, wanted: Connection) -> None:
    while True:
        if wanted.poll():
            num_steps = wanted.recv()
            if num_steps == 0:
                return
            run.forget_steps()
            wanted.send(run.step_seconds(num_steps))
        run.forget_steps()
        time.sleep(0.001)


@dataclass
class Load:
    """Hand-offs one after the other, while it `goes_on`."""

    pair: Pair
    num_blocks: int
    num_bytes: int = 0
    began: float = 0.0
    goes_on: bool = True

    async def nothing(self) -> None:
        """For comparison."""

    async def as_computed(self) -> None:
        """Prompts as a prefill GPU computes them: a layer at a time, never faster than it can."""
        num_layers = self.pair.options.num_layers
        seconds = self.num_blocks * BLOCK_SIZE / PREFILL_TOKENS_PER_SECOND / num_layers
        next_at = time.perf_counter()
        while self.goes_on:
            name = self.pair.open(self.num_blocks)
            for layer in range(num_layers):
                next_at += seconds
                await asyncio.sleep(max(0.0, next_at - time.perf_counter()))
                self.pair.computed(name, self.num_blocks, layer + 1)
            await self.pair.committed([name])
            self._count()

    async def as_fast_as_it_goes(self) -> None:
        """Several at once, so that the link never idles."""

        async def one_by_one() -> None:
            while self.goes_on:
                name = self.pair.open(self.num_blocks // 2)
                self.pair.computed(name, self.num_blocks // 2)
                await self.pair.committed([name])
                self._count(self.num_blocks // 2)

        await asyncio.gather(*(one_by_one() for _ in range(4)))

    def _count(self, num_blocks: int | None = None) -> None:
        self.num_bytes += (num_blocks or self.num_blocks) * self.pair.options.block_bytes

    @property
    def rate(self) -> float:
        return self.num_bytes / (time.perf_counter() - self.began)


async def steps_under(
    pair: Pair, load: Load, work: Callable[[], Coroutine[Any, Any, None]], num_steps: int
) -> tuple[list[float], float]:
    """Seconds of each step, and the bytes per second that arrived meanwhile."""
    load.goes_on = True
    sending = asyncio.create_task(work())
    await asyncio.sleep(0.3)
    load.num_bytes, load.began = 0, time.perf_counter()
    steps = await asyncio.to_thread(pair.ask, num_steps)
    rate = load.rate
    load.goes_on = False
    await sending
    await asyncio.sleep(0.1)
    return steps, rate


async def run(arguments: argparse.Namespace) -> str:
    shape = SHAPES["llama-3.1-8b"]
    options = PairOptions(
        source=arguments.source,
        target=arguments.target,
        num_layers=int(str(shape["num_hidden_layers"])),
        unit_bytes=64 * 1024,
        num_blocks=RECEIVING_BLOCKS,
        slot_bytes=None,
        num_slots=None,
        ucx_tls=None,
        require_transport="nvlink",
    )
    lines = [
        "| batch | KV arriving | GB/s | step p50 (ms) | p99 (ms) | throughput |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for batch in arguments.batch:
        lines += await batch_rows(arguments, options, batch)
    return "\n".join(lines)


async def batch_rows(arguments: argparse.Namespace, options: PairOptions, batch: int) -> list[str]:
    names = ("none", "as one prefill GPU computes it", "as fast as the link takes it")
    steps: dict[str, list[float]] = {name: [] for name in names}
    rates: dict[str, list[float]] = {name: [] for name in names}
    async with Pair(options, decode_process, batch, arguments.context) as pair:
        load = Load(pair, num_blocks=512)
        works = (load.nothing, load.as_computed, load.as_fast_as_it_goes)
        for turn in range(2 * arguments.rounds):
            # Contexts grow with every step: there and back, each load meets the same on average.
            order = list(zip(names, works, strict=True))
            for name, work in reversed(order) if turn % 2 else order:
                took, rate = await steps_under(pair, load, work, arguments.steps)
                steps[name] += took
                rates[name].append(rate)
        await asyncio.to_thread(pair.tell, 0)
    alone = statistics.mean(steps["none"])
    return [_row(batch, name, statistics.median(rates[name]), steps[name], alone) for name in names]


def _row(batch: int, name: str, rate: float, steps: list[float], alone: float) -> str:
    ordered = sorted(steps)
    p50, p99 = statistics.median(ordered), ordered[int(0.99 * len(ordered))]
    share = alone / statistics.mean(steps)
    return (
        f"| {batch} | {name} | {rate / 1e9:.1f} | {p50 * 1e3:.2f} | {p99 * 1e3:.2f} "
        f"| {share:.3f}x |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", default="cuda:0")
    parser.add_argument("--target", default="cuda:1")
    parser.add_argument("--batch", type=int, nargs="+", default=[64])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=150, help="of each turn")
    parser.add_argument("--rounds", type=int, default=2, help="there and back")
    parser.add_argument("--write", action="store_true", help="update benchmarks/RESULTS.md")
    arguments = parser.parse_args()
    table = run_as_node(run(arguments))
    print(table)
    if arguments.write:
        command = " ".join(["python -m benchmarks.decode_while_receiving", *sys.argv[1:]])
        facts = [f"command: `{command}`", *machine_facts()]
        text = "\n".join([table, "", *(f"- {fact}" for fact in facts)])
        write_section("decode while receiving", "Decode while KV arrives", text)


if __name__ == "__main__":
    main()
