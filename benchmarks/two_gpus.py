"""`python -m benchmarks.two_gpus`: the hand-off between two GPUs, beside one node doing both.

1. Write a folder with the config of a known shape and a tokenizer of its vocabulary.
2. Start `baton serve --prefill 1 --decode 1` on it with dummy weights.
3. Send the same load in turns: through the split pools, then with the policy set so that the
   decode node prefills everything itself. Prompts differ in each turn, so no cache helps.
4. For each arm: the time to the first token, and the exposed time of the hand-off, which is the
   gap between first and second token less a decode step of the same request (the median of its
   later gaps). One node doing both has no hand-off: what is left there is the gap's own noise.

The client is one process of this machine, so what it adds is in all arms alike.
"""

from __future__ import annotations

import statistics
import tempfile
import urllib.request
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.command import publish
from benchmarks.serve_process import ServeProcess
from benchmarks.served import (
    ADMIN_TOKEN,
    EVERYTHING,
    send,
    served_parser,
    set_policy,
    write_model_folder,
)

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from loadtest.record import RequestRecord

ARMS = {"split pools": 0, "one node doing both": EVERYTHING}
GAPS_BEFORE_STEADY = 3


def metrics(url: str, name: str) -> list[str]:
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        text = response.read().decode()
    return [line for line in text.splitlines() if line.startswith(name)]


@dataclass(slots=True)
class ArmTimes:
    """Seconds, a value for each request."""

    first_token: list[float] = field(default_factory=list)
    first_gap: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)

    def add(self, records: Sequence[RequestRecord]) -> None:
        for record in records:
            if record.failure is not None:
                raise RuntimeError(f"a request failed: {record.failure.message}")
            gaps = record.gaps
            self.first_token.append(record.time_to_first_token)
            self.first_gap.append(gaps[0])
            self.step.append(statistics.median(gaps[GAPS_BEFORE_STEADY:]))

    @property
    def exposed(self) -> list[float]:
        return [gap - step for gap, step in zip(self.first_gap, self.step, strict=True)]

    def cells(self) -> str:
        cells = (
            statistics.median(self.first_token),
            _p99(self.first_token),
            statistics.median(self.first_gap),
            statistics.median(self.step),
            statistics.median(self.exposed),
            _p99(self.exposed),
        )
        return " | ".join(f"{1e3 * cell:.2f}" for cell in cells)


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]


def rows_of(
    arguments: argparse.Namespace, serve: ServeProcess, input_len: int, concurrency: int
) -> list[str]:
    arms = {name: ArmTimes() for name in ARMS}
    for turn in range(arguments.turns):
        for index, (name, tokens) in enumerate(ARMS.items()):
            set_policy(serve.admin_url, local_prefill_tokens=tokens)
            seed = arguments.seed + input_len * 100 + turn * 10 + index
            arms[name].add(send(arguments, serve.url, input_len, concurrency, seed))
    alone = statistics.median(arms["one node doing both"].first_token)
    return [
        f"| {input_len} | {concurrency} | {name} | {times.cells()} "
        f"| {statistics.median(times.first_token) / alone:.3f}x |"
        for name, times in arms.items()
    ]


def measure(arguments: argparse.Namespace, folder: Path) -> str:
    write_model_folder(folder, arguments.shape, arguments.num_layers)
    options = ("--load-format", "dummy", "--max-model-len", str(arguments.max_model_len))
    lines = [
        "| prompt | at once | | TTFT p50 (ms) | p99 | second-token gap p50 | decode step p50 "
        "| exposed p50 | p99 | TTFT of one node's |",
        "|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    with ServeProcess(
        str(folder), *options, "--admin-token", ADMIN_TOKEN, *arguments.serve
    ) as serve:
        print(f"ready in {serve.wait_until_ready():.1f} s", flush=True)
        for input_len, concurrency in product(arguments.input_len, arguments.concurrency):
            rows = rows_of(arguments, serve, input_len, concurrency)
            print("\n".join(rows), flush=True)
            lines += rows
        transports = metrics(serve.url, "baton_kv_transport_info{")
        print(serve.log())
    num_requests = arguments.num_prompts * arguments.turns
    lines += [
        "",
        f"- {arguments.shape}, dummy weights, {num_requests} requests for each row and request at "
        f"once, {arguments.output_len} tokens each",
        *(f"- `{line}`" for line in transports),
    ]
    return "\n".join(lines)


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        table = measure(arguments, Path(folder))
    print(table)
    if arguments.write:
        publish("two_gpus", "split pools", "Split pools beside one node, two GPUs", table)


def parse_arguments() -> argparse.Namespace:
    parser = served_parser("two_gpus", __doc__)
    parser.add_argument("--output-len", type=int, default=24)
    parser.add_argument("--num-prompts", type=int, default=10, help="per concurrent request")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1])
    parser.add_argument("--turns", type=int, default=3, help="of each arm")
    return parser.parse_args()


if __name__ == "__main__":
    main()
