"""`make bench`: the bundled pocket model on this machine's CPU, against `transformers.generate`.

    1. Start `baton serve` a few times; the time to its first healthy answer is "ready".
    2. In rounds, alternating so that a change of the machine's mood meets both: transformers one
       prompt at a time, Baton at concurrency 1, transformers in a batch of 16, Baton at 16. Both
       get the same prompts of the same round; no prompt comes twice, so no cache helps.
    3. Short chats, one at a time, for the first-token time.
    4. Medians over the rounds, with the range. `--write` puts them into benchmarks/RESULTS.md.

Rates are output tokens over the whole time, prompts included, on both sides. Both sides use all
cores, and both lose more than their share when others use them too; so the reference is also
measured before Baton is started, and nothing is written when the machine was busy.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.command import parser_of, with_facts
from benchmarks.results_file import RESULTS, write_section
from benchmarks.serve_process import ROOT, ServeProcess
from loadtest.config import BenchConfig
from loadtest.run import run
from loadtest.workload import PlainVocabulary, plan_requests

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from loadtest.result import BenchResult

POCKET_MODEL = ROOT / "baton" / "pocket_model"
INPUT_LEN, OUTPUT_LEN, BATCH = 64, 128, 16
CHAT_INPUT_LEN, CHAT_OUTPUT_LEN, NUM_CHATS = 8, 16, 10
# Numbers of prompts in one round, one at a time and for each of the 16 streams.
SEQUENTIAL_PROMPTS, PROMPTS_PER_STREAM = 4, 3
# Above it, others used the cores before the first figure was taken.
BUSY_LOAD_PER_CORE = 0.5
EXIT_BUSY = 1


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: samples of both sides; medians are compared."""

    name: str
    ours: Sequence[float]
    reference: Sequence[float] = ()

    def cells(self) -> list[str]:
        if not self.reference:
            return [self.name, with_range(self.ours), "", ""]
        ratio = statistics.median(self.ours) / statistics.median(self.reference)
        return [self.name, with_range(self.ours), with_range(self.reference), f"{ratio:.2f}x"]


def with_range(samples: Sequence[float]) -> str:
    return f"{statistics.median(samples):.1f} ({min(samples):.1f} to {max(samples):.1f})"


class Reference:
    """The process of `transformers_reference.py`; `facts` is what it says of itself."""

    def __init__(self, dtype: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        script = Path(__file__).with_name("transformers_reference.py")
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-P", str(script), str(POCKET_MODEL), dtype],
            cwd=self._folder.name,
            env={"PYTHONPATH": sysconfig.get_paths()["purelib"], "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.facts = ", ".join(f"{name} {value}" for name, value in self._answer().items())

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()
        self._folder.cleanup()

    def tokens_per_second(self, prompts: Sequence[Sequence[int]], batch: int) -> float:
        """All prompts, `batch` of them together at a time."""
        seconds, num_tokens = 0.0, 0
        for first in range(0, len(prompts), batch):
            job = {"prompts": prompts[first : first + batch], "num_tokens": OUTPUT_LEN}
            print(json.dumps(job), file=self._process.stdin, flush=True)
            answer = self._answer()
            seconds += answer["seconds"]
            num_tokens += answer["num_tokens"]
        return num_tokens / seconds

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line:
            raise RuntimeError("the reference process ended; its error stands above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def main() -> int:
    arguments = parse()
    load, num_cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    say(expectation(load / num_cores))
    ready = measure_ready(arguments.rounds)
    with Reference(arguments.reference_dtype) as reference:
        alone = measure_alone(reference, arguments.seed)
        with ServeProcess() as cluster:
            cluster.wait_until_ready()
            samples = measure_rounds(reference, cluster.url, arguments.rounds, arguments.seed)
            first_tokens = measure_first_tokens(cluster.url, arguments.seed)
    table = render_table(to_rows(samples, first_tokens, ready))
    facts = [
        f"reference: {reference.facts}; before Baton was started: {alone[0]:.1f} tok/s in turn, "
        f"{alone[1]:.1f} in a batch",
        f"load average before: {load:.2f} on {num_cores} cores",
        f"{INPUT_LEN} tokens in, {OUTPUT_LEN} out, greedy; {NUM_CHATS} chats",
    ]
    text = with_facts("pocket", table, facts)
    print(text)
    return write_unless_busy(text, load / num_cores) if arguments.write else 0


def parse() -> argparse.Namespace:
    parser = parser_of("pocket", __doc__)
    parser.add_argument("--rounds", type=int, default=3, help="at least 3 for a published figure")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reference-dtype", choices=("float32", "bfloat16"), default="float32")
    return parser.parse_args()


def measure_ready(starts: int) -> list[float]:
    seconds = []
    for number in range(starts):
        say(f"start {number + 1} of {starts} of `baton serve`")
        with ServeProcess() as cluster:
            seconds.append(cluster.wait_until_ready())
    return seconds


def measure_alone(reference: Reference, seed: int) -> tuple[float, float]:
    """Tokens per second of the reference, in turn and in a batch, with nothing else running."""
    say("transformers alone")
    one = prompts_of(completion_config("http://unused", 1, SEQUENTIAL_PROMPTS, seed))
    many = prompts_of(completion_config("http://unused", BATCH, BATCH, seed))
    reference.tokens_per_second(one, 1)
    reference.tokens_per_second(many, BATCH)
    return reference.tokens_per_second(one, 1), reference.tokens_per_second(many, BATCH)


def measure_rounds(
    reference: Reference, url: str, rounds: int, seed: int
) -> dict[str, list[float]]:
    """Output tokens per second of each arm, one sample per round. Round 0 warms up."""
    samples: dict[str, list[float]] = {"ours 1": [], "ours 16": [], "ref 1": [], "ref 16": []}
    for number in range(rounds + 1):
        say(f"round {number} of {rounds}" if number else "warming up")
        one = completion_config(url, 1, SEQUENTIAL_PROMPTS, seed + 2 * number)
        many = completion_config(url, BATCH, BATCH * PROMPTS_PER_STREAM, seed + 2 * number + 1)
        measured = {
            "ref 1": reference.tokens_per_second(prompts_of(one), 1),
            "ours 1": run_whole(one).summary.output_throughput,
            "ref 16": reference.tokens_per_second(prompts_of(many), BATCH),
            "ours 16": run_whole(many).summary.output_throughput,
        }
        if number > 0:
            for name, value in measured.items():
                samples[name].append(value)
    return samples


def measure_first_tokens(url: str, seed: int) -> list[float]:
    """Milliseconds to the first token of short chats, one after the other."""
    say(f"{NUM_CHATS} short chats")
    config = BenchConfig(
        backend="openai-chat",
        base_url=url,
        num_prompts=NUM_CHATS,
        num_warmups=2,
        random_input_len=CHAT_INPUT_LEN,
        random_output_len=CHAT_OUTPUT_LEN,
        max_concurrency=1,
        temperature=0.0,
        seed=seed,
    )
    return [1e3 * record.time_to_first_token for record in run_whole(config).records]


def completion_config(url: str, concurrency: int, num_prompts: int, seed: int) -> BenchConfig:
    vocab_size = json.loads((POCKET_MODEL / "config.json").read_text())["vocab_size"]
    return BenchConfig(
        base_url=url,
        num_prompts=num_prompts,
        random_input_len=INPUT_LEN,
        random_output_len=OUTPUT_LEN,
        random_vocab_size=vocab_size,
        max_concurrency=concurrency,
        temperature=0.0,
        seed=seed,
    )


def prompts_of(config: BenchConfig) -> list[list[int]]:
    """The very prompts that the load client sends for this configuration."""
    requests, _ = plan_requests(config, "", PlainVocabulary(config.random_vocab_size))
    return [json.loads(request.body)["prompt"] for request in requests]


def run_whole(config: BenchConfig) -> BenchResult:
    """Measure; a figure from a run with failures would be no figure."""
    result = run(config)
    summary = result.summary
    if summary.failed or summary.num_uncounted:
        raise RuntimeError(f"not every answer was whole: {dict(summary.failures_by_class)}")
    return result


def expectation(load_per_core: float) -> str:
    """How long it takes. Threads of transformers wait for each other at every product, so beside
    others it loses most: a tenth of its rate was seen at a load of three on each core."""
    if load_per_core <= BUSY_LOAD_PER_CORE:
        return "about a minute on two cores"
    return (
        f"others use this machine (load {load_per_core:.1f} on each core): this takes minutes "
        "instead of one, and compares little"
    )


def say(what: str) -> None:
    """What is being measured now, for who waits; the result is standard output."""
    print(f"{what} …", file=sys.stderr)


def to_rows(
    samples: dict[str, list[float]], first_tokens: list[float], ready: list[float]
) -> list[Row]:
    return [
        Row("decode, 1 stream (tok/s)", samples["ours 1"], samples["ref 1"]),
        Row(
            "decode, 16 streams; reference: a batch (tok/s)", samples["ours 16"], samples["ref 16"]
        ),
        Row("decode, 16 streams; reference: in turn (tok/s)", samples["ours 16"], samples["ref 1"]),
        Row("first token of a short chat (ms)", first_tokens),
        Row("`baton serve` ready (s)", ready),
    ]


def render_table(rows: Sequence[Row]) -> str:
    lines = [["median (range)", "Baton", "transformers", "ratio"], ["---", "---:", "---:", "---:"]]
    lines += [row.cells() for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def write_unless_busy(text: str, load_per_core: float) -> int:
    if load_per_core > BUSY_LOAD_PER_CORE:
        print("\nNot written: the machine was busy with something else.", file=sys.stderr)
        return EXIT_BUSY
    write_section("pocket", "Pocket model, CPU (`make bench`)", text)
    print(f"\nWrote {RESULTS.relative_to(ROOT)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
