"""`python -m benchmarks.first_wave`: what an engine promises at its start, beside what follows.

1. Open an engine with dummy weights; note how long that takes.
2. Run waves of prompts of several shapes, each twice, with a decode step behind: the first
   wave must be as fast as the second, and no kernel may be compiled any more.
3. Fill a step with rows that ask for everything a request can ask for.
4. Compare the memory then used with the share that the engine was given.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import triton

from benchmarks.command import parser_of, with_facts
from benchmarks.model_shapes import SHAPES, write_config
from benchmarks.results_file import write_section
from cluster.prefix_hash import root_hash
from cluster.request import SamplingParams, SequenceRequest
from cluster.startup import StartupReport
from engine.config import EngineConfig
from engine.engine import Engine
from engine.schedule import ScheduledChunk, ScheduleDecision
from engine.sequence import Sequence

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence as SequenceOf

WAVES: tuple[tuple[int, ...], ...] = (
    (2048,) * 4,
    (512,) * 16,
    (64,) * 128,
    (32,) * 256,
    (8192,),
    (100, 300, 700, 1500, 2500),
    (777, 333),
    (5,),
)
BUSIEST = SamplingParams(
    max_tokens=1000,
    seed=1,
    top_p=0.9,
    top_k=50,
    min_p=0.01,
    presence_penalty=0.5,
    num_logprobs=20,
    ignore_eos=True,
)
GREEDY = SamplingParams(max_tokens=1000, seed=0, temperature=0.0, ignore_eos=True)


class Waves:
    """Prompts run together in one step; none begins like another."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._num_started = 0

    def run(self, lengths: SequenceOf[int], sampling: SamplingParams) -> tuple[float, float]:
        """Milliseconds of the step that computes the prompts, and of a decode step behind it."""
        sequences = [self._start(length, sampling) for length in lengths]
        prefill = self._step([(each, each.num_prompt_tokens) for each in sequences])
        decode = self._step([(each, 1) for each in sequences])
        for sequence in sequences:
            self._engine.block_manager.free(sequence)
        return prefill, decode

    def run_in_chunks(self, num_tokens: int, sampling: SamplingParams) -> None:
        """One prompt, as many tokens in a step as the engine takes."""
        sequence = self._start(num_tokens, sampling)
        while sequence.num_uncomputed_tokens:
            chunk = min(sequence.num_uncomputed_tokens, self._engine.max_num_batched_tokens)
            self._step([(sequence, chunk)])
            if sequence.num_output_tokens:
                break
        self._engine.block_manager.free(sequence)

    def _step(self, chunks: SequenceOf[tuple[Sequence, int]]) -> float:
        for sequence, length in chunks:
            if not self._engine.block_manager.allocate(
                sequence, sequence.num_computed_tokens + length
            ):
                raise SystemExit("The KV pool is too small for this benchmark.")
        decision = ScheduleDecision(tuple(ScheduledChunk(*chunk) for chunk in chunks))
        begun = time.perf_counter()
        self._engine.step(decision)
        return 1e3 * (time.perf_counter() - begun)

    def _start(self, num_tokens: int, sampling: SamplingParams) -> Sequence:
        self._num_started += 1
        generator = torch.Generator().manual_seed(self._num_started)
        vocabulary = self._engine.model_config.vocab_size
        prompt = torch.randint(0, vocabulary, (num_tokens,), generator=generator)
        request = SequenceRequest(
            sequence_id=f"s{self._num_started}",
            request_id=f"s{self._num_started}",
            prompt_token_ids=tuple(prompt.tolist()),
            sampling=sampling,
        )
        root = root_hash("bench", b"")
        return Sequence(request, block_size=self._engine.config.block_size, root=root)


def open_engine(arguments: argparse.Namespace, folder: Path) -> Engine:
    write_config(folder, arguments.shape)
    config = EngineConfig(
        model=folder,
        load_format="dummy",
        device="cuda",
        max_model_len=32768,
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        gpu_memory_utilization=arguments.gpu_memory_utilization,
        enable_prefix_caching=False,
    )
    return Engine.create(config, progress=StartupReport(sink=lambda fact: None))


def measure(arguments: argparse.Namespace, folder: Path) -> str:
    begun = time.perf_counter()
    engine = open_engine(arguments, folder)
    opened = time.perf_counter() - begun
    compiled = note_compilations()
    lines = ["| prompts | first (ms) | again (ms) | decode, first | again |", "|---|" + "---:|" * 4]
    waves = Waves(engine)
    for lengths in WAVES:
        first, again = (waves.run(lengths, GREEDY) for _ in range(2))
        name = f"{len(lengths)} of {lengths[0]}" if len(set(lengths)) == 1 else f"{lengths}"
        figures = (first[0], again[0], first[1], again[1])
        lines.append(f"| {name} | {' | '.join(f'{each:.1f}' for each in figures)} |")
        print(lines[-1], flush=True)
    waves.run((32,) * engine.max_num_seqs, BUSIEST)
    return "\n".join([*lines, "", *facts_of(engine, arguments, opened, compiled)])


def note_compilations() -> list[str]:
    """Names of the kernels compiled, or read from disk, from now on."""
    compiled: list[str] = []

    def note(**facts: Any) -> bool:
        compiled.append(str(facts["fn"].name))
        return False

    triton.knobs.runtime.jit_cache_hook = note
    return compiled


def facts_of(
    engine: Engine, arguments: argparse.Namespace, opened: float, compiled: SequenceOf[str]
) -> list[str]:
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    share = total * arguments.gpu_memory_utilization
    pool = engine.kv_cache.num_blocks * engine.kv_cache.layout.block_bytes
    return [
        f"- engine ready in {opened:.1f} s, weights drawn included",
        f"- kernels compiled after the start: {', '.join(compiled) or 'none'}",
        f"- memory used after all of it: {(total - free) >> 20} MiB; share given: "
        f"{int(share) >> 20} MiB, {100 * (total - free) / share:.2f} % of it",
        f"- KV pool: {pool >> 20} MiB",
    ]


def main() -> int:
    parser = parser_of("first_wave", __doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA GPU found; these figures need one", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        text = measure(arguments, Path(folder))
    text = with_facts("first_wave", text)
    print(text)
    if arguments.write:
        write_section("first wave", "The first wave after a start, and memory", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
