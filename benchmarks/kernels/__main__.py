"""`python -m benchmarks.kernels [family ...]`: what every kernel takes beside what the GPU can do.

1. Measure the limits: the rate of a large copy and of a large matrix product, in this run.
2. For each family, each case: the median time of a graph of many calls over inputs that together
   exceed the second-level cache (timing.py).
3. A figure stands beside its floor, the bytes that must move over the copy's rate or the operations
   over the product's, whichever is longer, and beside the opponent's time where there is one.
4. `--write` puts the table and the run's metadata into benchmarks/RESULTS.md.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.command import command_of, parser_of, with_facts
from benchmarks.kernels import decode_attention, gated, linear, prefill_attention, small
from benchmarks.kernels.ceilings import Ceilings, measure_ceilings
from benchmarks.kernels.timing import Case, graph_seconds
from benchmarks.results_file import write_section
from loadtest.metadata import collect_metadata

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

FAMILIES = {
    "decode_attention": decode_attention.cases,
    "prefill_attention": prefill_attention.cases,
    "linear": linear.cases,
    "gated": gated.cases,
    "small": small.cases,
}
HEAD = "| kernel | us | rate | floor (us) | share of the limit | opponent (us) | against it |"


@dataclass(frozen=True, slots=True)
class Figure:
    """One case's time and its comparisons. peer_microseconds: 0 without an opponent."""

    name: str
    microseconds: float
    floor_microseconds: float
    limit: str
    bytes_per_second: float
    flops_per_second: float
    peer: str
    peer_microseconds: float

    @property
    def share(self) -> float:
        return self.floor_microseconds / self.microseconds

    def cells(self) -> list[str]:
        by_copy = self.limit == "copy"
        rate = (
            f"{self.bytes_per_second / 1e12:.2f} TB/s"
            if by_copy
            else f"{self.flops_per_second / 1e12:.0f} TFLOP/s"
        )
        peer = f"{self.peer_microseconds:.1f} ({self.peer})" if self.peer_microseconds else ""
        ratio = f"{self.peer_microseconds / self.microseconds:.2f}x" if peer else ""
        return [
            self.name,
            f"{self.microseconds:.1f}",
            rate,
            f"{self.floor_microseconds:.1f}",
            f"{self.share:.1%} of {self.limit}",
            peer,
            ratio,
        ]


def measure(case: Case, ceilings: Ceilings) -> Figure:
    seconds = graph_seconds(case.make, case.num_copies)
    by_copy = case.num_bytes / ceilings.copy >= case.num_flops / ceilings.matmul
    return Figure(
        name=case.name,
        microseconds=1e6 * seconds,
        floor_microseconds=1e6 * ceilings.floor_seconds(case.num_bytes, case.num_flops),
        limit="copy" if by_copy else "product",
        bytes_per_second=case.num_bytes / seconds,
        flops_per_second=case.num_flops / seconds,
        peer=case.peer,
        peer_microseconds=1e6 * peer_seconds(case),
    )


def peer_seconds(case: Case) -> float:
    """0 where this GPU or this torch has no such opponent."""
    if case.make_peer is None:
        return 0.0
    try:
        return graph_seconds(case.make_peer, case.num_copies)
    except RuntimeError as error:
        print(f"no opponent for {case.name}: {str(error).splitlines()[0]}", file=sys.stderr)
        return 0.0


def run(families: Sequence[str], only: str, ceilings: Ceilings) -> list[Figure]:
    figures = []
    for family in families:
        for case in FAMILIES[family]():
            if only in case.name:
                figures.append(measure(case, ceilings))
                print(" | ".join(figures[-1].cells()), flush=True)
                torch.cuda.empty_cache()
    return figures


def render_table(figures: Sequence[Figure]) -> str:
    lines = [HEAD, "|---|" + "---:|" * 6]
    lines += ["| " + " | ".join(figure.cells()) + " |" for figure in figures]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = parser_of("kernels", __doc__)
    parser.add_argument(
        "families", nargs="*", default=[], metavar="family", help=f"of {[*FAMILIES]}"
    )
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.families) - set(FAMILIES))
    if unknown:
        parser.error(f"no family {', '.join(unknown)}; there are {', '.join(FAMILIES)}")
    arguments.families = arguments.families or list(FAMILIES)
    return arguments


def main() -> int:
    arguments = parse()
    if not torch.cuda.is_available():
        print("no CUDA GPU found; these figures need one", file=sys.stderr)
        return 1
    torch.manual_seed(arguments.seed)
    ceilings = measure_ceilings()
    print(f"limits: {ceilings.line()}", flush=True)
    figures = run(arguments.families, arguments.only, ceilings)
    fact = f"limits of the same run: {ceilings.line()}"
    text = with_facts("kernels", render_table(figures), [fact])
    print(text)
    if arguments.json:
        record = {
            "metadata": collect_metadata().as_dict(),
            "command": command_of("kernels"),
            "ceilings": asdict(ceilings),
            "figures": [asdict(figure) for figure in figures],
        }
        arguments.json.write_text(json.dumps(record, indent=2))
    if arguments.write:
        write_section("kernels", "Kernels on one GPU", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
