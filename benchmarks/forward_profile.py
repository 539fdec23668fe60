"""`python -m benchmarks.forward_profile --prefill 2048 8192 --decode 1 32`: the kernels of a pass.

    1. Build a model of the shape with random weights, and a pool with scrambled blocks.
    2. Each pass alone, without scheduler or sampling: the median of its time. Decode replays a
       captured graph, as the engine does; prefill is queued kernel by kernel.
    3. The same pass once under torch's profiler: each kernel's calls and time.

`--fp8`: weights and KV in float8.

Times of kernels in a profile do not add up to that of the pass: what lies between them is missing,
and chained kernels overlap. `--write` puts the tables into benchmarks/RESULTS.md.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.command import parser_of, publish
from benchmarks.model_shapes import SHAPES
from benchmarks.random_model import BLOCK_SIZE, Model, captured, median_ms

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

SHOWN_KERNELS, NAME_LENGTH = 12, 56


def kernel_lines(run: Callable[[], object]) -> list[str]:
    """`| kernel | calls | us each | ms |` of one run, the longest first."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    calls: dict[str, int] = defaultdict(int)
    micros: dict[str, float] = defaultdict(float)
    for event in recorded.events() or ():
        if event.device_time > 0:
            calls[event.name] += 1
            micros[event.name] += event.device_time
    names = sorted(micros, key=lambda name: -micros[name])
    lines = [
        f"| {name[:NAME_LENGTH]} | {calls[name]} | {micros[name] / calls[name]:.1f} | "
        f"{micros[name] / 1e3:.2f} |"
        for name in names[:SHOWN_KERNELS]
    ]
    return [*lines, f"| all {sum(calls.values())} | | | {sum(micros.values()) / 1e3:.2f} |"]


def section(title: str, run: Callable[[], object], milliseconds: float) -> str:
    head = ["| kernel | calls | us each | ms |", "|---|---:|---:|---:|"]
    return "\n".join([f"{title}: {milliseconds:.2f} ms", "", *head, *kernel_lines(run), ""])


def measure(arguments: argparse.Namespace) -> str:
    torch.manual_seed(arguments.seed)
    longest = max([*arguments.prefill, arguments.context])
    rows = max(arguments.decode, default=0)
    num_tokens = max(longest, rows * (arguments.context + BLOCK_SIZE))
    model = Model(arguments.shape, num_tokens, longest, is_fp8=arguments.fp8)
    sections = []
    for count in arguments.prefill:
        run: Callable[[], object] = partial(model.run, model.prefill(count))
        sections.append(section(f"prefill of {count} tokens", run, median_ms(run)))
        print(sections[-1], flush=True)
    for count in arguments.decode:
        run = partial(model.run, model.decode(count, arguments.context))
        name = f"decode of {count}, context {arguments.context}"
        sections.append(section(name, run, median_ms(captured(run))))
        print(sections[-1], flush=True)
    return "\n".join(sections)


def main() -> int:
    parser = parser_of("forward_profile", __doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--prefill", type=int, nargs="*", default=[2048, 8192])
    parser.add_argument("--decode", type=int, nargs="*", default=[1, 32])
    parser.add_argument("--context", type=int, default=1100, help="of decode")
    parser.add_argument("--fp8", action="store_true", help="weights and KV in float8")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA GPU found; these figures need one", file=sys.stderr)
        return 1
    with torch.inference_mode():
        text = measure(arguments)
    if arguments.write:
        publish("forward_profile", "forward-profile", "Kernels of a pass", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
