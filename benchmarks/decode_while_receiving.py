"""`python -m benchmarks.decode_while_receiving`: what arriving KV costs those who decode.

1. A process decodes a batch on one GPU with dummy weights, as a node does, and is at the same time
   the receiver of hand-offs into other blocks of the same pool.
2. This process sends, in turns: nothing; as much as one prefill GPU can compute, layer by layer; as
   much as the receiver takes, at several paces (`--kv-receive-rate`), the last without any. No one
   prefill node can make these.
3. For each, the time from step to step. Rows take turns, there and back, each way from the same
   context: it grows with every step.

Beside each stands what the bytes alone would cost: those that arrive cross the memory once, and a
step is bound by the memory.

    python -m benchmarks.decode_while_receiving [--rates 16 32 0] [--write]
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from benchmarks.command import parser_of, publish
from benchmarks.engine_run import EngineRun
from benchmarks.kernels.ceilings import copy_bandwidth
from benchmarks.kv_pair import BLOCK_SIZE, Pair, PairOptions, Source, receive, run_as_node
from benchmarks.model_shapes import SHAPES, write_config
from cluster.startup import StartupReport
from engine.config import EngineConfig
from engine.engine import Engine
from kv_transfer.config import KVTransferConfig

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Coroutine
    from multiprocessing.connection import Connection

    from kv_transfer.receiving.receiver import KVReceiver

RECEIVING_BLOCKS = 1536
HAND_OFFS_AT_ONCE = 6
# What one GPU computes at most: a prompt of 8192 tokens of the 8B shape in a little less.
PREFILL_TOKENS_PER_SECOND = 42_000
DEFAULT_RATE = KVTransferConfig().kv_receive_rate


class Question(NamedTuple):
    """For the decode process: how long `num_steps` took at a pace of `rate` GB/s (0: none), or
    None, when it has begun anew with the first context. `num_steps` 0: it may end."""

    num_steps: int
    rate: int = 0
    begins_anew: bool = False


def decode_process(
    options: PairOptions, where: Connection, questions: Connection, batch: int, context: int
) -> None:
    with TemporaryDirectory() as folder:
        write_config(Path(folder), "llama-3.1-8b", options.num_layers)
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
        answers = Answers(run, questions, batch, context)
        run_as_node(answers.while_receiving(options, block_ids, where))


class Answers:
    """What a decode process says of its steps."""

    def __init__(self, run: EngineRun, questions: Connection, batch: int, context: int) -> None:
        self._run = run
        self._questions = questions
        self._batch, self._context = batch, context
        self._receivers: list[KVReceiver] = []

    async def while_receiving(
        self, options: PairOptions, block_ids: list[int], where: Connection
    ) -> None:
        (pool,) = self._run.engine.kv_pools
        await asyncio.to_thread(self._run.start_decode, self._batch, self._context)
        answering = asyncio.create_task(asyncio.to_thread(self._answer_all))
        await receive(
            options,
            pool,
            Source(block_ids, _Silent()),
            where,
            is_decoding=lambda: self._run.is_busy,
            on_receiver=self._receivers.append,
        )
        await answering

    def _answer_all(self) -> None:
        while True:
            if self._questions.poll():
                question: Question = self._questions.recv()
                if question.num_steps == 0:
                    return
                self._questions.send(self._answer(question))
            self._run.forget_steps()
            time.sleep(0.001)

    def _answer(self, question: Question) -> list[float] | None:
        if question.begins_anew:
            self._run.clear()
            self._run.start_decode(self._batch, self._context)
            return None
        for receiver in self._receivers:
            receiver.pace.bytes_per_second = question.rate * 1e9
        self._run.forget_steps()
        return self._run.step_seconds(question.num_steps)


class _Silent:
    """Nobody asks when a sequence has started."""

    def send(self, fact: object) -> None: ...


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
            self._count(self.num_blocks)

    async def as_fast_as_it_goes(self) -> None:
        """Several at once, so that the link never idles."""
        num_blocks = RECEIVING_BLOCKS // HAND_OFFS_AT_ONCE

        async def one_by_one() -> None:
            while self.goes_on:
                name = self.pair.open(num_blocks)
                self.pair.computed(name, num_blocks)
                await self.pair.committed([name])
                self._count(num_blocks)

        await asyncio.gather(*(one_by_one() for _ in range(HAND_OFFS_AT_ONCE)))

    def _count(self, num_blocks: int) -> None:
        self.num_bytes += num_blocks * self.pair.options.block_bytes

    @property
    def bytes_per_second(self) -> float:
        return self.num_bytes / (time.perf_counter() - self.began)


@dataclass
class Row:
    """`work`: a method of `Load`. `rate`: GB/s of the receiver's pace, 0: none."""

    name: str
    work: Callable[[Load], Coroutine[Any, Any, None]]
    rate: int = DEFAULT_RATE
    steps: list[float] = field(default_factory=list)  # seconds of each
    arrived: list[float] = field(default_factory=list)  # bytes per second, of each turn

    async def take_turn(self, load: Load, num_steps: int) -> None:
        load.goes_on = True
        sending = asyncio.create_task(self.work(load))
        await asyncio.sleep(0.3)
        load.num_bytes, load.began = 0, time.perf_counter()
        self.steps += await asyncio.to_thread(load.pair.ask, Question(num_steps, self.rate))
        self.arrived.append(load.bytes_per_second)
        load.goes_on = False
        await sending
        await asyncio.sleep(0.1)

    def line(self, batch: int, alone: float, copy_rate: float) -> str:
        """`alone`: mean seconds of a step while nothing arrives; `copy_rate`: bytes per second,
        read and written."""
        ordered = sorted(self.steps)
        p50, p99 = statistics.median(ordered), ordered[int(0.99 * len(ordered))]
        arrived = statistics.median(self.arrived)
        share = alone / statistics.mean(ordered)
        return (
            f"| {batch} | {self.name} | {arrived / 1e9:.1f} | {p50 * 1e3:.2f} | {p99 * 1e3:.2f} "
            f"| {share:.3f}x | {1.0 - arrived / copy_rate:.3f}x |"
        )


def make_rows(rates: list[int]) -> list[Row]:
    at_rates = [
        Row(f"at {rate} GB/s" if rate else "as fast as it goes", Load.as_fast_as_it_goes, rate)
        for rate in rates
    ]
    computed = Row("as one prefill GPU computes it", Load.as_computed)
    return [Row("none", Load.nothing), computed, *at_rates]


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
    with torch.cuda.device(arguments.source):
        copy_rate = copy_bandwidth()
        torch.cuda.empty_cache()
    lines = [
        "| batch | KV arriving | GB/s | step p50 (ms) | p99 (ms) | throughput | by bytes alone |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for batch in arguments.batch:
        rows = await measured(arguments, options, batch)
        alone = statistics.mean(rows[0].steps)
        lines += [row.line(batch, alone, copy_rate) for row in rows]
    return "\n".join(lines)


async def measured(arguments: argparse.Namespace, options: PairOptions, batch: int) -> list[Row]:
    rows = make_rows(arguments.rates)
    async with Pair(options, decode_process, batch, arguments.context) as pair:
        load = Load(pair, num_blocks=512)
        for turn in range(2 * arguments.rounds):
            await asyncio.to_thread(pair.ask, Question(1, begins_anew=True))
            for row in reversed(rows) if turn % 2 else rows:
                await row.take_turn(load, arguments.steps)
        await asyncio.to_thread(pair.tell, Question(0))
    return rows


def main() -> None:
    parser = parser_of("decode_while_receiving", __doc__)
    parser.add_argument("--source", default="cuda:0")
    parser.add_argument("--target", default="cuda:1")
    parser.add_argument("--batch", type=int, nargs="+", default=[64])
    parser.add_argument("--context", type=int, default=1024, help="of each turn's first step")
    parser.add_argument("--steps", type=int, default=60, help="of each turn")
    parser.add_argument("--rounds", type=int, default=1, help="there and back")
    parser.add_argument(
        "--rates", type=int, nargs="+", default=[16, DEFAULT_RATE, 64, 128, 0], help="GB/s"
    )
    arguments = parser.parse_args()
    table = run_as_node(run(arguments))
    print(table)
    if arguments.write:
        title = "Decode while KV arrives"
        publish("decode_while_receiving", "decode while receiving", title, table)


if __name__ == "__main__":
    main()
