"""`python -m benchmarks.gpu_suite`: every check and every table that needs a GPU, in one call.

1. Each part is a command of its own with a time limit, cheapest and most telling first, so that a
   suite that is cut short has told the most.
2. A part that needs more GPUs than there are is left out, and said to be.
3. Of each part is shown what it printed last, and every test that failed, however it ended; at the
   end how each ended and what it took. The tables are written to benchmarks/RESULTS.md by the parts
   themselves (`--write`).
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

# Each test on a line of its own: what a part that is cut short had found is not lost.
_TESTS = "-m pytest -v --tb=short -p no:cacheprovider -p no:benchmark"
_PYTEST = f"{_TESTS} -m gpu"
_FAULTS = f"{_TESTS} -m faults --dist loadfile tests/faults --ignore tests/faults/test_rank_rows.py"
# The bundled model's tokens come fast on a GPU: more of them, or a fault finds nothing to disturb.
_FAULTS_ON_GPUS = {
    "BATON_FAULT_OPTIONS": "--device cuda --num-gpu-blocks-override 2048 "
    "--staging-slot-bytes 4194304",
    "BATON_FAULT_TOKENS": "200",
}


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    command: str  # what follows the interpreter
    seconds: int
    num_gpus: int = 1
    writes: bool = True  # has a `--write`
    environment: Mapping[str, str] = field(default_factory=dict)


PARTS = (
    Part("kernel tests", f"{_PYTEST} -n 8 tests/kernels", 240, writes=False),
    Part("engine", "-m benchmarks.engine --steps 100 --repeats 3", 110),
    Part("kernels", "-m benchmarks.kernels decode_attention prefill_attention", 60),
    Part(
        "engine, fp8",
        "-m benchmarks.engine --quantization fp8 --batch 1 32 128 --prefill 2048 8192",
        60,
    ),
    Part(
        "engine tests",
        f"{_PYTEST} tests/engine tests/decode_node tests/prefill_node",
        300,
        writes=False,
    ),
    Part("first wave", "-m benchmarks.first_wave", 60),
    Part("memory", "-m benchmarks.memory", 90),
    Part(
        "KV transfer",
        "-m benchmarks.kv_transfer --source cuda:0 --target cuda:1",
        80,
        num_gpus=2,
    ),
    Part(
        "KV transfer, steps",
        "-m benchmarks.kv_trace --source cuda:0 --target cuda:1",
        45,
        num_gpus=2,
    ),
    Part(
        "split pools",
        "-m benchmarks.two_gpus",
        120,
        num_gpus=2,
    ),
    Part("served steps", "-m benchmarks.kv_trace_served", 90, num_gpus=2),
    Part("decode while receiving", "-m benchmarks.decode_while_receiving", 100, num_gpus=2),
    Part(
        "KV tiers",
        "-m benchmarks.kv_tiers --prompts 2048 8192 16384 --host-gib 12 --repeats 5",
        150,
    ),
    Part(
        "prefix fetch",
        "-m benchmarks.prefix_fetch --input-len 8192 2048 --repeats 3 --host-gib 12",
        225,
        num_gpus=2,
    ),
    Part("launches", "-m benchmarks.launches", 40),
    Part("launches, fp8", "-m benchmarks.launches --fp8", 40),
    Part("tensor parallel", "-m benchmarks.tensor_parallel", 90, num_gpus=2),
    Part("rank profile", "-m benchmarks.rank_profile", 90, num_gpus=2),
    Part(
        "tests of ranks",
        f"{_PYTEST} -n 4 tests/engine/tensor_parallel tests/e2e tests/kv_transfer",
        150,
        num_gpus=2,
        writes=False,
    ),
    # Slots that are mapped, as between two GPUs of a machine; then every frame through UCX, where
    # a test can spoil it.
    Part(
        "faults",
        f"{_FAULTS} -n 4",
        400,
        writes=False,
        environment={**_FAULTS_ON_GPUS, "BATON_TEST_PLAIN_LINKS": "1"},
    ),
    Part(
        "faults, UCX",
        f"{_FAULTS} -n 2 -k 'link_rows or p4 or p7'",
        300,
        writes=False,
        environment=_FAULTS_ON_GPUS,
    ),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    name: str
    ending: str
    seconds: float
    shown: tuple[str, ...]


def run_part(part: Part, *, write: bool, num_lines: int) -> Outcome:
    words = [sys.executable, *shlex.split(part.command)]
    if write and part.writes:
        words.append("--write")
    print(f"== {part.name}: {' '.join(words[1:])}", flush=True)
    began = time.perf_counter()
    try:
        done = subprocess.run(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=part.seconds,
            env={**os.environ, **part.environment},
            check=False,
        )
        output, ending = done.stdout, f"exit code {done.returncode}"
    except subprocess.TimeoutExpired as cut:
        raw = cut.stdout or b""
        output = raw.decode(errors="replace") if isinstance(raw, bytes) else raw
        ending = f"cut after {part.seconds} s"
    lines = [line for line in output.splitlines() if line.strip()]
    failed = [line for line in lines[:-num_lines] if " FAILED " in line or " ERROR " in line]
    shown = (*failed, *lines[-num_lines:])
    return Outcome(part.name, ending, time.perf_counter() - began, shown)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_suite", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    names = [part.name for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART")
    parser.add_argument("--lines", type=int, default=30, help="shown of each part")
    parser.add_argument("--write", action="store_true", help="update benchmarks/RESULTS.md")
    arguments = parser.parse_args(argv)
    num_gpus = torch.cuda.device_count()
    outcomes = []
    for part in PARTS:
        if part.name not in arguments.parts:
            continue
        if part.num_gpus > num_gpus:
            print(f"== {part.name}: left out, it needs {part.num_gpus} GPU(s)")
            continue
        outcome = run_part(part, write=arguments.write, num_lines=arguments.lines)
        outcomes.append(outcome)
        print("\n".join(outcome.shown), flush=True)
    print("\n| part | ending | seconds |\n|---|---|---:|")
    for outcome in outcomes:
        print(f"| {outcome.name} | {outcome.ending} | {outcome.seconds:.0f} |")
    return int(any(outcome.ending != "exit code 0" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
