"""`python -m benchmarks.tensor_parallel`: what a step costs when several GPUs share the model.

    1. One engine after the other on the same machine, in the same run: of 1 rank, of 2, ...
    2. Each figure as `benchmarks.engine` measures it: prompts in one step, decode steps of n
       sequences, whole steps with sampling.
    3. Print them beside each other, and how many times faster than the first.

The prompts are the same in all engines. The floor is that of all their GPUs together.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from contextlib import closing
from pathlib import Path

import torch

from benchmarks.engine import SHAPES, Figure, Limits, decode, measure_limits, prefill
from benchmarks.results_file import machine_facts
from cluster.startup import StartupReport
from engine.config import EngineConfig
from engine.engine import Engine


def open_engine(arguments: argparse.Namespace, folder: Path, num_ranks: int) -> Engine:
    blocks_of_one = -(-arguments.max_model_len // 16)
    needed = max(arguments.batch) * -(-(arguments.context + arguments.steps + 16) // 16)
    config = EngineConfig(
        model=folder,
        load_format="dummy",
        device="cuda:0",
        tensor_parallel_size=num_ranks,
        max_model_len=arguments.max_model_len,
        max_num_seqs=max(arguments.batch),
        max_num_batched_tokens=max(arguments.prefill),
        num_gpu_blocks_override=max(blocks_of_one, needed),
        enable_prefix_caching=False,
    )
    return Engine.create(config, progress=StartupReport())


def measure(
    arguments: argparse.Namespace, folder: Path, num_ranks: int, limits: Limits
) -> list[Figure]:
    together = Limits(limits.copy_bandwidth * num_ranks, limits.matmul_rate * num_ranks)
    with closing(open_engine(arguments, folder, num_ranks)) as engine:
        figures = [
            decode(engine, num_seqs, arguments.context, together, arguments.steps)
            for num_seqs in arguments.batch
        ]
        figures += [prefill(engine, n, together, arguments.repeats) for n in arguments.prefill]
    for figure in figures:
        print(f"{num_ranks} ranks: {figure.line()}", flush=True)
    del engine
    gc.collect()
    torch.cuda.empty_cache()
    return figures


def table(ranks: list[int], figures: list[list[Figure]]) -> str:
    """Rows of markdown: one for each figure, one column for each number of ranks."""
    heads = [f"TP {size}, ms" for size in ranks] + [f"TP {size} faster" for size in ranks[1:]]
    lines = ["| step | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for row in zip(*figures, strict=True):
        times = [figure.median_ms for figure in row]
        cells = [f"{ms:.3f}" for ms in times] + [f"{times[0] / ms:.2f}x" for ms in times[1:]]
        lines.append(f"| {row[0].name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time steps of a model over several GPUs.")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], metavar="GPUS")
    parser.add_argument("--prefill", type=int, nargs="+", default=[2048, 8192], metavar="TOKENS")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], metavar="SEQUENCES")
    parser.add_argument("--context", type=int, default=1024, metavar="TOKENS")
    parser.add_argument("--steps", type=int, default=200, help="timed decode steps of each row")
    parser.add_argument("--repeats", type=int, default=5, help="timed prefills of each length")
    parser.add_argument("--max-model-len", type=int, default=16384)
    return parser.parse_args()


def main() -> None:
    arguments = read_arguments()
    limits = measure_limits(torch.device("cuda", 0))
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[arguments.shape]))
        figures = [measure(arguments, Path(folder), size, limits) for size in arguments.ranks]
    print("\n".join(machine_facts()))
    print(f"{arguments.shape}, medians, context {arguments.context}")
    print(table(arguments.ranks, figures))


if __name__ == "__main__":
    main()
