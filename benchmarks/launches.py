"""`python -m benchmarks.launches`: what launching the kernels of a prompt costs the host.

    1. One kernel, launched as Triton does it and as `kernels/launch.py` does: one after the other
       (warm), and each after the host has worked through other memory (cold).
    2. A pass of a prompt, alone or behind a cached prefix, both ways: until the host has queued all
       kernels, and until the GPU is done. Beside it the same kernels as a captured graph, which
       asks the host for nothing, and, where the engine may do so, the tokens as rows of a captured
       decode step (`engine/prompt_rows.py`).

`--fp8`: weights and KV in float8. `--write` puts the tables into benchmarks/RESULTS.md.
"""

from __future__ import annotations

import statistics
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from benchmarks.command import parser_of, publish
from benchmarks.model_shapes import SHAPES
from benchmarks.random_model import DEVICE, DTYPE, Model, captured, median_ms
from engine.batch import Batch
from kernels.launch import Launches
from kernels.rope_store import rope_store

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

REPEATS, LAUNCHES, COLD_LAUNCHES = 9, 100, 30
MAX_ROWS = 128
OTHER_MEMORY_BYTES = 96 << 20  # more than what caches hold for one core


def by_triton() -> AbstractContextManager[object]:
    """Everything is launched as if `kernels/launch.py` did not exist."""

    def launch(self: Launches, grid: Any, *args: object, **named: object) -> None:
        self._kernel.run(*args, grid=grid, warmup=False, **named)

    return mock.patch.object(Launches, "__call__", launch)


def one_kernel() -> Iterator[str]:
    qkv = torch.randn(64, 48 * 128, device=DEVICE, dtype=DTYPE)
    pool = torch.zeros(64, 2, 8, 16, 128, device=DEVICE, dtype=DTYPE)
    places = torch.arange(64, device=DEVICE)
    cos_sin = torch.randn(4096, 128, device=DEVICE)

    def run() -> None:
        rope_store(qkv, pool, places, places, cos_sin)

    yield "| `rope_store` of 64 tokens, us of the host | warm | cold |"
    yield "|---|---:|---:|"
    with by_triton():
        yield f"| launched by Triton | {warm_us(run):.1f} | {cold_us(run):.1f} |"
    yield f"| launched directly | {warm_us(run):.1f} | {cold_us(run):.1f} |"


def warm_us(run: Callable[[], None]) -> float:
    run()
    samples = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(LAUNCHES):
            run()
        samples.append((time.perf_counter() - began) / LAUNCHES)
    return 1e6 * statistics.median(samples)


def cold_us(run: Callable[[], None]) -> float:
    other = torch.zeros(OTHER_MEMORY_BYTES, dtype=torch.uint8)
    samples = []
    for _ in range(COLD_LAUNCHES):
        torch.cuda.synchronize()
        other.add_(1)
        began = time.perf_counter()
        run()
        samples.append(time.perf_counter() - began)
    return 1e6 * statistics.median(samples)


def passes(arguments: argparse.Namespace) -> Iterator[str]:
    longest = max(cached + new for cached, new in arguments.prompts)
    model = Model(arguments.shape, 2 * longest, longest, is_fp8=arguments.fp8)
    yield (
        "| tokens behind cached ones | launched by | queued (ms) | done (ms) | a graph (ms) "
        "| rows of a decode step (ms) |"
    )
    yield "|---|---|---:|---:|---:|---:|"
    for cached, new in arguments.prompts:
        batch = model.prefill(new, cached)

        def run() -> None:
            model.run(batch)  # noqa: B023

        run()
        graph, rows = median_ms(captured(run)), rows_ms(model, batch)
        with by_triton():
            figures = [("Triton", *queued_and_done_ms(run))]
        figures.append(("directly", *queued_and_done_ms(run)))
        for name, queued, done in figures:
            figures_of_it = f"{queued:.2f} | {done:.2f} | {graph:.2f} | {rows}"
            yield f"| {new} behind {cached} | {name} | {figures_of_it} |"


def rows_ms(model: Model, batch: Batch) -> str:
    num_rows = len(batch.token_ids)
    if num_rows > MAX_ROWS:
        return "-"
    rows = Batch(
        token_ids=batch.token_ids,
        positions=batch.positions,
        slot_mapping=batch.slot_mapping,
        samples=None,
        seq_lens=(batch.positions + 1).int(),
        cu_seqlens_q=torch.zeros(num_rows + 1, dtype=torch.int32, device=DEVICE),
        block_tables=batch.block_tables.expand(num_rows, -1).contiguous(),
        num_samples=num_rows,
        max_seqlen_q=1,
        is_decode=True,
    )
    return f"{median_ms(captured(partial(model.run, rows))):.2f}"


def queued_and_done_ms(run: Callable[[], None]) -> tuple[float, float]:
    run()
    queued, done = [], []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        queued.append(time.perf_counter() - began)
        torch.cuda.synchronize()
        done.append(time.perf_counter() - began)
    return 1e3 * statistics.median(queued), 1e3 * statistics.median(done)


def prompt(words: str) -> tuple[int, int]:
    """CACHED+NEW."""
    cached, new = words.split("+")
    return int(cached), int(new)


def main() -> int:
    parser = parser_of("launches", __doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.1-8b")
    parser.add_argument(
        "--prompts", type=prompt, nargs="+", metavar="CACHED+NEW",
        default=[
            (0, 2048), (0, 512), (0, 64), (2048, 16), (2048, 64), (8192, 16), (8192, 128),
            (8192, 512),
        ],
    )  # fmt: skip
    parser.add_argument("--fp8", action="store_true", help="weights and KV in float8")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA GPU found; these figures need one", file=sys.stderr)
        return 1
    lines = []
    with torch.inference_mode():
        for part in (one_kernel(), passes(arguments)):
            for line in part:
                print(line, flush=True)
                lines.append(line)
            lines.append("")
    if arguments.write:
        name = "launches fp8" if arguments.fp8 else "launches"
        publish("launches", name, "Launching the kernels of a prompt", "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
