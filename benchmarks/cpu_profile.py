"""`python -m benchmarks.cpu_profile`: where a step of the pocket model goes on this CPU.

    1. Steps of one kind through a bare engine, without gateway or scheduler: decode of 1 and of 16
       sequences, prefill of one long prompt and of 16 short ones. The figure is the median of the
       quietest of some rounds: other programs on the same cores only ever add to it.
    2. The same steps under torch's profiler: the time inside its operations, by what they are for,
       scaled so that operations and everything else (Python, its calls of torch) add up to 1.
    3. The same steps under cProfile: how many Python functions a step calls. A loop over sequences
       or blocks would show as a number that grows with them.

`--write` puts the table into benchmarks/RESULTS.md.
"""

from __future__ import annotations

import cProfile
import os
import pstats
import statistics
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.command import parser_of, with_facts
from benchmarks.results_file import write_section
from benchmarks.serve_process import ROOT
from cluster.prefix_hash import root_hash
from cluster.request import SamplingParams, SequenceRequest
from cluster.startup import StartupReport
from engine.config import EngineConfig
from engine.engine import Engine
from engine.schedule import ScheduledChunk, ScheduleDecision
from engine.sequence import Sequence

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

POCKET_MODEL = ROOT / "baton" / "pocket_model"
CONTEXT = 256
WARM_UP_STEPS, ROUNDS, ROUND_STEPS, PROFILED_STEPS = 8, 8, 20, 20

PRODUCTS, ATTENTION, OTHER, PYTHON = "products", "attention", "other operations", "Python"
PURPOSES = {
    "mkldnn::_linear_pointwise": PRODUCTS,
    "aten::bmm": ATTENTION,
    "aten::baddbmm": ATTENTION,
    "aten::_softmax": ATTENTION,
    "aten::index_select": ATTENTION,
    "aten::masked_fill_": ATTENTION,
    "aten::index_fill_": ATTENTION,
}


@dataclass(frozen=True, slots=True)
class Kind:
    """Steps alike: `num_seqs` sequences, each of `num_tokens` tokens (decode: one)."""

    name: str
    num_seqs: int
    num_tokens: int

    @property
    def is_decode(self) -> bool:
        return self.num_tokens == 1


KINDS = (
    Kind("decode, 1 sequence", 1, 1),
    Kind("decode, 16 sequences", 16, 1),
    Kind("prefill, 1 x 512 tokens", 1, 512),
    Kind("prefill, 16 x 32 tokens", 16, 32),
)


@dataclass(frozen=True, slots=True)
class Profile:
    kind: Kind
    milliseconds: float
    shares: dict[str, float]
    calls: int
    top: str

    def cells(self) -> list[str]:
        shares = [f"{self.shares[name]:.0%}" for name in (PRODUCTS, ATTENTION, OTHER, PYTHON)]
        return [self.kind.name, f"{self.milliseconds:.2f}", *shares, str(self.calls), self.top]


class Steps:
    """Steps of one kind, as many as asked for, over sequences of their own."""

    def __init__(self, engine: Engine, kind: Kind, seed: int) -> None:
        self._engine = engine
        self._kind = kind
        self._generator = torch.Generator().manual_seed(seed)
        self._names = iter(range(1 << 30))
        self._running = self._open() if kind.is_decode else []
        if kind.is_decode:
            self._prefill(self._running)

    def run(self, count: int, profiler: cProfile.Profile | None = None) -> list[float]:
        """Seconds of each of `count` steps; `profiler` sees the steps and nothing else."""
        times = []
        for _ in range(count):
            sequences = self._running or self._open()
            decision = self._decide(sequences)
            begin = time.perf_counter()
            if profiler is None:
                self._engine.step(decision)
            else:
                profiler.runcall(self._engine.step, decision)
            times.append(time.perf_counter() - begin)
            if not self._kind.is_decode:
                self._free(sequences)
        return times

    def close(self) -> None:
        self._free(self._running)

    def _open(self) -> list[Sequence]:
        """New sequences; no prompt comes twice, so no cache helps."""
        length = CONTEXT if self._kind.is_decode else self._kind.num_tokens
        return [self._sequence(length) for _ in range(self._kind.num_seqs)]

    def _sequence(self, length: int) -> Sequence:
        vocab_size = self._engine.model_config.vocab_size
        prompt = torch.randint(0, vocab_size, (length,), generator=self._generator)
        name = f"{self._kind.name} {next(self._names)}"
        request = SequenceRequest(
            sequence_id=name,
            request_id=name,
            prompt_token_ids=tuple(prompt.tolist()),
            sampling=SamplingParams(max_tokens=4096, temperature=0.0, seed=0, ignore_eos=True),
        )
        block_size = self._engine.config.block_size
        return Sequence(request, block_size=block_size, root=root_hash("profile", b""))

    def _prefill(self, sequences: SequenceOf[Sequence]) -> None:
        for sequence in sequences:
            self._engine.step(self._decide([sequence]))

    def _decide(self, sequences: SequenceOf[Sequence]) -> ScheduleDecision:
        manager = self._engine.block_manager
        for sequence in sequences:
            if not manager.allocate(sequence, len(sequence.token_ids)):
                raise RuntimeError("the KV pool is too small for this profile")
        return ScheduleDecision(
            chunks=tuple(ScheduledChunk(each, each.num_uncomputed_tokens) for each in sequences)
        )

    def _free(self, sequences: SequenceOf[Sequence]) -> None:
        for sequence in sequences:
            self._engine.block_manager.free(sequence)


def open_engine(num_threads: int) -> Engine:
    config = EngineConfig(
        model=POCKET_MODEL,
        device="cpu",
        max_model_len=1024,
        max_num_seqs=16,
        max_num_batched_tokens=1024,
        num_threads=num_threads,
        enable_prefix_caching=False,
    )
    return Engine.create(config, progress=StartupReport(sink=lambda fact: None))


def measure(engine: Engine, kind: Kind, seed: int) -> Profile:
    steps = Steps(engine, kind, seed)
    steps.run(WARM_UP_STEPS)
    seconds = min(statistics.median(steps.run(ROUND_STEPS)) for _ in range(ROUNDS))
    shares, top = operation_shares(steps)
    calls = python_calls(steps)
    steps.close()
    return Profile(kind, 1e3 * seconds, shares, calls, top)


def operation_shares(steps: Steps) -> tuple[dict[str, float], str]:
    """Share of each purpose, and the three operations that take longest."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        total = sum(steps.run(PROFILED_STEPS)) * 1e6
    shares = dict.fromkeys((PRODUCTS, ATTENTION, OTHER, PYTHON), 0.0)
    operations: dict[str, float] = {}
    for event in recorded.key_averages():
        share = event.self_cpu_time_total / total
        shares[PURPOSES.get(event.key, OTHER)] += share
        operations[event.key.partition("::")[2]] = share
    shares[PYTHON] = max(0.0, 1 - sum(shares.values()))
    longest = sorted(operations, key=lambda name: -operations[name])[:3]
    top = ", ".join(f"{name} {operations[name]:.0%}" for name in longest)
    return shares, top


def python_calls(steps: Steps) -> int:
    """Calls of Python functions in one step, those into C not counted."""
    profiler = cProfile.Profile(builtins=False)
    steps.run(PROFILED_STEPS, profiler)
    entries = pstats.Stats(profiler).get_stats_profile().func_profiles.values()
    return round(sum(int(entry.ncalls.split("/")[0]) for entry in entries) / PROFILED_STEPS)


def table(profiles: SequenceOf[Profile]) -> str:
    head = ["step", "ms", PRODUCTS, ATTENTION, OTHER, PYTHON, "Python calls", "longest"]
    lines = [head, ["---", *["---:"] * 6, "---"], *(each.cells() for each in profiles)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> int:
    parser = parser_of("cpu_profile", __doc__)
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    engine = open_engine(arguments.num_threads)
    text = table([measure(engine, kind, arguments.seed) for kind in KINDS])
    fact = f"decode at contexts of {CONTEXT} tokens and more; load average before: {load:.2f}"
    text = with_facts("cpu_profile", text, [fact])
    print(text)
    if arguments.write:
        write_section("cpu-profile", "CPU step profile (`python -m benchmarks.cpu_profile`)", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
