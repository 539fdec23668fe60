"""`python -m benchmarks.tensor_parallel`: what a step costs when several GPUs share the model.

    1. One engine after the other on the same machine, in the same run: of 1 rank, of 2, ...
    2. Each figure as `benchmarks.engine_run` measures it: the first token of one prompt, and the
       time between the steps of n sequences, driven by a node's scheduler and loop.
    3. Print them beside each other, and how many times faster than the first.

The prompts are the same in all engines. The floor is that of all their GPUs together.
"""

from __future__ import annotations

import gc
import statistics
import sys
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.command import parser_of, with_facts
from benchmarks.engine_run import EngineRun
from benchmarks.floors import Floors
from benchmarks.kernels.ceilings import Ceilings, measure_ceilings
from benchmarks.model_shapes import SHAPES, write_config
from benchmarks.results_file import write_section
from cluster.startup import StartupReport
from engine.config import EngineConfig
from engine.engine import Engine

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Figure:
    """Milliseconds: the median, and the least that all GPUs of the engine allow together."""

    name: str
    ms: float
    floor_ms: float


def open_engine(arguments: argparse.Namespace, folder: Path, num_ranks: int) -> Engine:
    longest = max(max(arguments.prefill), arguments.context + arguments.steps + 256) + 256
    blocks = max(arguments.batch) * -(-(arguments.context + arguments.steps + 256) // 16)
    config = EngineConfig(
        model=folder,
        load_format="dummy",
        device="cuda:0",
        tensor_parallel_size=num_ranks,
        max_model_len=longest,
        max_num_seqs=max(arguments.batch),
        max_num_batched_tokens=max(arguments.prefill),
        num_gpu_blocks_override=max(blocks, -(-longest // 16)),
        quantization=arguments.quantization,
        enable_prefix_caching=False,
    )
    return Engine.create(config, progress=StartupReport(sink=lambda fact: None))


def measure(
    arguments: argparse.Namespace, folder: Path, num_ranks: int, ceilings: Ceilings
) -> list[Figure]:
    together = Ceilings(ceilings.copy * num_ranks, ceilings.matmul * num_ranks)
    figures = []

    def add(name: str, seconds: Sequence[float], floor_seconds: float) -> None:
        figures.append(Figure(name, 1e3 * statistics.median(seconds), 1e3 * floor_seconds))
        print(f"{num_ranks} ranks, {figures[-1]}", flush=True)

    with closing(open_engine(arguments, folder, num_ranks)) as engine, EngineRun(engine, 0) as run:
        floors = Floors.of(engine, together)
        print(run.check_is_realistic(min(32, engine.max_num_seqs)), flush=True)
        for num_seqs in arguments.batch:
            times = run.decode_seconds(num_seqs, arguments.context, arguments.steps)
            floor = floors.decode_by_bytes(num_seqs, arguments.context + arguments.steps // 2)
            add(f"decode {num_seqs} x {arguments.context}", times, floor)
        for length in arguments.prefill:
            times = [run.first_token_seconds(length) for _ in range(arguments.repeats + 2)][2:]
            add(f"prefill {length}", times, floors.prefill(length))
    del engine, run
    gc.collect()
    torch.cuda.empty_cache()
    return figures


def table(ranks: list[int], figures: list[list[Figure]]) -> str:
    """Rows of markdown: one for each figure, two columns for each number of ranks."""
    heads = [f"TP {size} (ms) | floor" for size in ranks]
    heads += [f"TP {size} faster" for size in ranks[1:]]
    lines = ["| figure | " + " | ".join(heads) + " |", "|---|" + "---:|" * (3 * len(ranks) - 1)]
    for row in zip(*figures, strict=True):
        cells = [f"{each.ms:.2f} | {each.floor_ms:.2f}" for each in row]
        cells += [f"{row[0].ms / each.ms:.2f}x" for each in row[1:]]
        lines.append(f"| {row[0].name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = parser_of("tensor_parallel", __doc__)
    add = parser.add_argument
    add("--shape", choices=sorted(SHAPES), default="llama-3.1-8b")
    add("--ranks", type=int, nargs="+", default=[1, 2], metavar="GPUS")
    add("--prefill", type=int, nargs="+", default=[2048, 8192], metavar="TOKENS")
    add("--batch", type=int, nargs="+", default=[1, 32], metavar="SEQUENCES")
    add("--context", type=int, default=1024, metavar="TOKENS")
    add("--steps", type=int, default=200, help="timed decode steps of each row")
    add("--repeats", type=int, default=5, help="timed prefills of each length")
    add("--quantization")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    ceilings = measure_ceilings()
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), arguments.shape)
        figures = [measure(arguments, Path(folder), size, ceilings) for size in arguments.ranks]
    facts = [
        f"limits of one GPU: {ceilings.line()}",
        "decode: time between steps; prefill: one prompt to its first token",
    ]
    text = with_facts("tensor_parallel", table(arguments.ranks, figures), facts)
    print(text)
    if arguments.write:
        write_section("tensor parallel", f"Several GPUs share {arguments.shape}", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
