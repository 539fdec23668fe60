"""`python -m benchmarks.memory`: whether an engine keeps to its share of a GPU, and uses it.

1. Open an engine with dummy weights; its KV pool is what it believes to be left of its share.
2. Run the largest steps it can be asked for: all rows with everything a request can ask for, the
   longest prompt in the largest chunks, a decode step of all rows.
3. What the driver then says is used, less weights and pool, is what steps really need. The pool
   ought to be the share less the weights and that.
4. Take the rest of the memory away and run a step: it must be refused, and the one after it, with
   the memory back, must run.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from benchmarks.command import parser_of, with_facts
from benchmarks.first_wave import BUSIEST, GREEDY, Waves
from benchmarks.model_shapes import SHAPES, write_config
from benchmarks.results_file import write_section
from cluster.errors import OutOfMemory
from cluster.startup import StartupReport
from engine.config import EngineConfig
from engine.engine import Engine

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

MIB = 1 << 20


class Used(NamedTuple):
    """Bytes of one GPU after the largest steps. `used`: by whoever is on it."""

    total: int
    used: int
    reserved: int  # by torch, in this process
    weights: int
    pool: int


def open_engine(arguments: argparse.Namespace, folder: Path) -> Engine:
    write_config(folder, arguments.shape)
    config = EngineConfig(
        model=folder,
        load_format="dummy",
        device="cuda:0",
        tensor_parallel_size=arguments.ranks,
        max_model_len=arguments.max_model_len,
        max_num_seqs=arguments.max_num_seqs,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        gpu_memory_utilization=arguments.gpu_memory_utilization,
        quantization=arguments.quantization,
        enable_prefix_caching=False,
    )
    return Engine.create(config, progress=StartupReport(sink=lambda fact: None))


def run_largest_steps(engine: Engine) -> None:
    waves, rows = Waves(engine), engine.max_num_seqs
    for sampling in (BUSIEST, GREEDY):
        waves.run((engine.max_num_batched_tokens // rows,) * rows, sampling)
    waves.run_in_chunks(engine.max_model_len - 1, BUSIEST)
    torch.cuda.synchronize()


def used_of(engine: Engine) -> Used:
    """Of the first rank's GPU."""
    free, total = torch.cuda.mem_get_info()
    cache = engine.kv_cache
    storages = {
        storage.data_ptr(): storage.nbytes()
        for view in engine._runner._decoder.checkpoint_views().values()
        if (storage := view.untyped_storage()).device.type == "cuda"
    }
    return Used(
        total=total,
        used=total - free,
        reserved=torch.cuda.memory_reserved(),
        weights=sum(storages.values()),
        pool=cache.num_blocks * cache.layout.block_bytes,
    )


def table(used: Used, utilization: float, others: Sequence[int]) -> str:
    """Markdown. `others`: bytes used on the GPUs of the other ranks."""
    share = int(used.total * utilization)
    beside = used.used - used.weights - used.pool
    outside = used.used - used.reserved
    fitting = share - used.weights - beside
    rows = [
        (f"share: {utilization} of {used.total / MIB:.0f}", share),
        ("weights", used.weights),
        ("beside weights and pool, after the largest steps", beside),
        ("of that outside torch's allocator", outside),
        ("KV pool that would fill the share", fitting),
        ("KV pool", used.pool),
        ("used in all", used.used),
        *((f"used in all, rank {rank}", each) for rank, each in enumerate(others, start=1)),
    ]
    lines = ["| one GPU | MiB | of the share |", "|---|---:|---:|"]
    lines += [f"| {name} | {size / MIB:.0f} | {size / share:.2%} |" for name, size in rows]
    return "\n".join([*lines, "", f"- KV pool beside what fits: {used.pool / fitting - 1:+.2%}"])


def step_without_memory(engine: Engine) -> str:
    """What became of a step that could get no memory, and of the next one."""
    waves, prompts = Waves(engine), (engine.max_num_batched_tokens,)
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    try:
        waves.run(prompts, GREEDY)
        refused = "computed"
    except OutOfMemory as error:
        refused = f"refused as `{error.code}`"
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    waves.run(prompts, GREEDY)
    return f"- a step that can get no memory: {refused}; the step after it ran"


def measure(arguments: argparse.Namespace, folder: Path) -> str:
    with closing(open_engine(arguments, folder)) as engine:
        run_largest_steps(engine)
        used = used_of(engine)
        others = []
        for rank in range(1, arguments.ranks):
            free, total = torch.cuda.mem_get_info(rank)
            others.append(total - free)
        lines = [table(used, arguments.gpu_memory_utilization, others)]
        if arguments.ranks == 1:  # ranks that share a step end with one that breaks off
            lines.append(step_without_memory(engine))
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = parser_of("memory", __doc__)
    add = parser.add_argument
    add("--shape", choices=sorted(SHAPES), default="llama-3.1-8b")
    add("--ranks", type=int, default=1, metavar="GPUS")
    add("--max-model-len", type=int, default=32768, metavar="TOKENS")
    add("--max-num-seqs", type=int, default=256, metavar="SEQUENCES")
    add("--max-num-batched-tokens", type=int, default=8192, metavar="TOKENS")
    add("--gpu-memory-utilization", type=float, default=0.9, metavar="SHARE")
    add("--quantization")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    if torch.cuda.device_count() < arguments.ranks:
        print("these figures need a CUDA GPU for each rank", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        text = with_facts("memory", measure(arguments, Path(folder)))
    print(text)
    if arguments.write:
        name, title = "memory", "Memory of one GPU: the share, and what it is used for"
        if arguments.ranks > 1:
            name, title = f"memory of {arguments.ranks}", f"{title}, {arguments.ranks} ranks"
        write_section(name, title, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
