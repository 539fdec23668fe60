"""Mixed load and random faults for some minutes: `python -m tests.faults.soak --minutes 5`.

    1. A cluster is started: two prefill and two decode nodes, two gateways, Redis, each behind a
       proxy. Every kind of request is asked once, undisturbed: its tokens are the oracle.
    2. Clients ask these again and again, in random order: short and long prompts that share
       beginnings, greedy and sampled, streamed and whole; some leave in between, some have a
       deadline that they may not meet.
    3. Meanwhile faults come and go, drawn from the seed: a process is killed, ends in order, or
       stands still, a node is cordoned or cannot be heard, Redis is slow or gone, KV is spoiled on
       its way. Each is verified.
    4. At the end all is healed: the cluster must be whole, hold nothing, and answer everything as
       the oracle does, without an error. The gateways must have counted what the clients saw.

The exit code is 1 when a token was wrong, a request hung, something stayed held, a fault did not
take place, or a program told of an error that no fault causes. Errors of the kinds that a fault may
cause are counted, not held against it; what an operator does in order may cause none.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.results_file import machine_facts, write_section
from tests.e2e.cluster_process import eventually
from tests.faults.checker import hung
from tests.faults.cluster import FaultCluster
from tests.faults.faulty_node import EAGER_VARIABLE, PLAIN_VARIABLE
from tests.faults.leaks import await_quiescence, baseline, held_by
from tests.faults.metrics import scrape
from tests.faults.soak_asks import AT_ONCE, NUM_TEMPLATES, answers, draw_templates, steady
from tests.faults.soak_faults import KINDS
from tests.faults.soak_lines import errors_said
from tests.faults.soak_run import Soak

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.faults.leaks import Held

WHOLE_WITHIN_SECONDS = 90.0
MIB = 1 << 20
TIERS = (
    *("--num-gpu-blocks-override", "128", "--max-model-len", "1024"),
    *("--kv-offloading-size", "0.02", "--fetch-prefixes"),
)


def main(argv: Sequence[str]) -> int:
    options = parser().parse_args(argv)
    reports = [run_seed(seed, options) for seed in options.seed]
    print("\n" + table(reports))
    if options.write:
        facts = [
            f"command: `python -m tests.faults.soak {' '.join(argv)}`",
            "two prefill and two decode nodes, two gateways, Redis and a proxy before each; the "
            f"bundled model in float32; {AT_ONCE} clients at once, {NUM_TEMPLATES} kinds of "
            "requests. Errors are those that a fault may cause; wrong, hung, leaks and broken "
            "rules must be 0",
            *machine_facts(),
        ]
        section = table(reports) + "\n\n" + "\n".join(f"- {fact}" for fact in facts)
        write_section("soak", "Mixed load under random faults", section)
    return 1 if any(report.problems for report in reports) else 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="tests.faults.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--minutes", type=float, default=5.0, help="of load, for each seed")
    made.add_argument("--seed", type=int, nargs="+", default=[1])
    made.add_argument("--policy", choices=("fail", "recompute"), default="recompute")
    made.add_argument(
        "--tiers",
        action="store_true",
        help="small pools with host memory below them, and prefixes fetched from peers",
    )
    made.add_argument("--gateways", type=int, default=2, metavar="N")
    made.add_argument("--longest-prompt", type=int, default=500, metavar="TOKENS")
    made.add_argument(
        "--faults",
        nargs="*",
        choices=KINDS,
        default=KINDS,
        help="kinds that are made; all others are not. Without any, nothing is disturbed",
    )
    made.add_argument(
        "--history", type=Path, help="write what happened to PATH.SEED.jsonl and .log"
    )
    made.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    made.add_argument(
        "options", nargs="*", help="behind `--`: options of `baton serve`, which beat ours"
    )
    return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one seed gave."""

    seed: int
    minutes: float
    outcomes: Counter[str]
    errors: Counter[str]
    num_tokens: int
    faults: Counter[str]
    num_wrong: int
    num_hung: int
    leaks: list[str]
    grown: tuple[tuple[str, int], ...]
    problems: list[str]


def run_seed(seed: int, options: argparse.Namespace) -> Report:
    with tempfile.TemporaryDirectory(prefix="soak-") as made:
        folder = Path(made)
        cluster = FaultCluster(
            *("--prefill", "2", "--decode", "2", "--dtype", "float32"),
            *("--lease-seconds", "3", "--stall-seconds", "10"),
            *("--max-num-batched-tokens", "128", "--max-recomputes", "16"),
            *("--kv-load-failure-policy", options.policy, "--stream-recovery"),
            *(TIERS if options.tiers else ()),
            *options.options,
            seed=seed,
            num_gateways=options.gateways,
            env=environment_of(options),
            kv_orders=folder,
        )
        try:
            return soak(cluster, folder, seed, options)
        finally:
            cluster.stop()


def environment_of(options: argparse.Namespace) -> dict[str, str]:
    """Links that can be spoiled take copies in one piece; others take blocks from pool to pool."""
    is_on = {EAGER_VARIABLE: options.tiers, PLAIN_VARIABLE: "spoil" not in options.faults}
    return {name: "1" for name, wanted in is_on.items() if wanted}


def soak(cluster: FaultCluster, folder: Path, seed: int, options: argparse.Namespace) -> Report:
    templates, oracle = steady(cluster, draw_templates(seed, options.longest_prompt))
    before, pids = baseline(cluster), cluster.pids()
    running = Soak(cluster, folder, seed, templates, oracle, options.faults)
    print(
        f"seed {seed}: {len(templates)} of {NUM_TEMPLATES} kinds of requests get the same tokens "
        f"whenever nothing disturbs them; {options.minutes:g} minutes of faults with these",
        flush=True,
    )
    running.run(options.minutes)
    eventually(cluster.is_whole, WHOLE_WITHIN_SECONDS)
    if options.tiers:
        running.problems += list(unused_tiers(cluster))
    if answers(cluster, templates) != oracle:
        running.problems.append("after all was healed the answers are not the oracle's")
    leaks = await_quiescence(cluster, before)
    running.problems += leaks
    if options.history is not None:
        running.history.write(options.history.with_suffix(f".{seed}.jsonl"))
        said_by_all = "\n".join(cluster.lines) + "\n"
        options.history.with_suffix(f".{seed}.log").write_text(said_by_all)
    told = errors_said(cluster.lines)
    running.problems += [f"{count} x {what}" for what, count in told.most_common()]
    report = report_of(running, options.minutes, leaks, grown(cluster, before, pids))
    print(said(report), flush=True)
    return report


def unused_tiers(cluster: FaultCluster) -> Iterator[str]:
    """What was to be disturbed, and did not take place."""
    told = [scrape(cluster.metrics_address(name)) for name in cluster.node_names]
    for what, name in (
        ("was fetched", "baton_prefix_fetched_tokens_total"),
        ("was read from host memory", "baton_host_kv_bytes_total"),
        ("came from there for a peer", "baton_host_kv_given_blocks_total"),
    ):
        num = sum(each.value(name) for each in told)
        print(f"{what}: {num:.0f}")
        if not num:
            yield f"nothing {what}"


def grown(
    cluster: FaultCluster, before: dict[str, Held], pids: dict[str, int]
) -> tuple[tuple[str, int], ...]:
    """Each process that has lived all the time, and the bytes by which its memory has grown."""
    return tuple(
        (name, held_by(pid).resident_bytes - before[name].resident_bytes)
        for name, pid in pids.items()
        if cluster.child(name) == pid
    )


def report_of(
    running: Soak, minutes: float, leaks: list[str], grown: tuple[tuple[str, int], ...]
) -> Report:
    history = running.history
    endings = Counter(
        event.kind
        for event in history.events
        if event.kind in ("finished", "failed", "refused", "left", "broken", "hung")
    )
    errors = Counter(e.detail for e in history.events if e.kind in ("failed", "refused", "broken"))
    return Report(
        seed=running.seed,
        minutes=minutes,
        outcomes=endings,
        errors=errors,
        num_tokens=history.num_tokens,
        faults=running.faults.made,
        num_wrong=running.num_wrong,
        num_hung=hung(history),
        leaks=leaks,
        grown=grown,
        problems=running.problems,
    )


def said(report: Report) -> str:
    """For the person who started it."""
    lines = [
        f"seed {report.seed}, {report.minutes:g} minutes:",
        f"  requests     {report.outcomes.total()}",
        *(f"    {kind:<10} {count}" for kind, count in report.outcomes.most_common()),
        f"  tokens       {report.num_tokens}",
        f"  errors       {dict(report.errors) or 'none'}",
        f"  faults made  {report.faults.total()}",
        *(f"    {what:<30} {count}" for what, count in sorted(report.faults.items())),
        f"  wrong tokens {report.num_wrong} requests",
        f"  hung         {report.num_hung} requests",
        f"  leaks        {len(report.leaks)}",
        "  memory       (MiB) "
        + ", ".join(f"{name} {added / MIB:+.0f}" for name, added in report.grown),
        f"  verdict      {'every rule was kept' if not report.problems else 'BROKEN:'}",
        *(f"    {problem}" for problem in report.problems),
    ]
    return "\n".join(lines)


def table(reports: Sequence[Report]) -> str:
    head = (
        *("seed", "minutes", "requests", "finished", "left", "errors", "faults made"),
        *("wrong tokens", "hung", "leaks", "broken rules", "memory (MiB)"),
    )
    lines: list[Sequence[str]] = [head, ["---:"] * len(head)]
    lines += [
        (
            str(report.seed),
            f"{report.minutes:g}",
            str(report.outcomes.total()),
            str(report.outcomes["finished"]),
            str(report.outcomes["left"]),
            ", ".join(f"{count} {code}" for code, count in report.errors.most_common()) or "0",
            str(report.faults.total()),
            str(report.num_wrong),
            str(report.num_hung),
            str(len(report.leaks)),
            str(len(report.problems)),
            f"{max((added for _, added in report.grown), default=0) / MIB:+.0f}",
        )
        for report in reports
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
