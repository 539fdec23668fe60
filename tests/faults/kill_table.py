"""What it costs to kill or stall any one process under load: `python -m tests.faults.kill_table`.

For each seed one `baton serve` with two prefill and two decode nodes, and on it, in turn, each
kind of process killed (SIGKILL) and stalled (SIGSTOP for some seconds) while clients stream:

    1. The requests of the seed run undisturbed: their tokens are the oracle.
    2. They run again; when a third of them has ended, the fault is made and verified.
    3. When all have ended: tokens are compared, errors are counted against the requests that were
       in flight on that process, and every node is asked what it still holds.

Recovery is what clients feel: from the fault until the last error, or the longest silence on any
stream, whichever is longer. "Whole again" is when every process serves and nothing is held.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.results_file import machine_facts, write_section
from tests.e2e.cluster_process import eventually
from tests.faults.asks import draw_asks
from tests.faults.checker import hung, violations, wrong_tokens
from tests.faults.client import load
from tests.faults.history import LAST, Answer, History
from tests.faults.leaks import Held, await_quiescence, baseline
from tests.faults.nemesis import Nemesis
from tests.faults.placements import Placements, watched
from tests.faults.served_cluster import ServedCluster

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.faults.asks import Ask

AT_ONCE = 12
WHOLE_WITHIN_SECONDS = 90.0
MAX_RECOVERY_SECONDS = 10.0
POLICIES = {
    "fail": (),
    "recompute": ("--kv-load-failure-policy", "recompute", "--stream-recovery"),
}
VICTIMS = {"prefill": "prefill-0", "decode": "decode-0", "redis": "redis", "gateway": "gateway"}
ACTIONS = ("kill", "stall")
UNNOTICED_SECONDS = 1.0  # in which a node that died may still be given requests
Oracle = dict[int, Answer]


@dataclass(frozen=True, slots=True)
class Case:
    policy: str
    seed: int
    victim: str
    action: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Of one fault. Durations in seconds."""

    case: Case
    num_requests: int
    num_wrong: int
    num_hung: int
    leaks: list[str]
    errors: Counter[str]
    num_in_flight: int
    recovery: float
    whole: float
    violations: list[str]

    @property
    def num_errors(self) -> int:
        return self.errors.total()

    @property
    def is_kept(self) -> bool:
        """The promise: nothing wrong, hung or leaked, errors only in flight, soon over."""
        return (
            not (self.num_wrong or self.num_hung or self.leaks or self.violations)
            and self.num_errors <= self.num_in_flight
            and self.recovery <= MAX_RECOVERY_SECONDS
        )


def main(argv: Sequence[str]) -> int:
    options = parser().parse_args(argv)
    outcomes: list[Outcome] = []
    for policy in options.policies:
        for seed in range(1, options.seeds + 1):
            outcomes += run_seed(policy, seed, options)
            if options.write:  # what was measured is not lost with a later seed
                title = "Kill or stall any one process under load"
                write_section("kill table", title, text(outcomes, options, argv))
    print("\n" + table(outcomes))
    broken = [outcome for outcome in outcomes if not outcome.is_kept]
    for outcome in broken:
        print(f"NOT KEPT: {said(outcome)}")
    return 1 if broken else 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="tests.faults.kill_table", description=__doc__)
    made.add_argument("--seeds", type=int, default=3, help="how many, from 1 on")
    made.add_argument("--requests", type=int, default=200, help="for each fault")
    made.add_argument("--tokens", type=int, default=16, help="that each request asks for")
    made.add_argument("--stall-seconds", type=float, default=6.0)
    made.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    made.add_argument("--victims", nargs="+", choices=VICTIMS, default=list(VICTIMS))
    made.add_argument("--actions", nargs="+", choices=ACTIONS, default=list(ACTIONS))
    made.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    return made


def run_seed(policy: str, seed: int, options: argparse.Namespace) -> list[Outcome]:
    """All faults of one seed, on one cluster."""
    cluster = ServedCluster("--dtype", "float32", *POLICIES[policy])
    try:
        asks = draw_asks(seed, options.requests, num_tokens=options.tokens)
        oracle = undisturbed(cluster, asks)
        before = baseline(cluster)
        found = []
        for victim, action in itertools.product(options.victims, options.actions):
            case = Case(policy, seed, victim, action)
            outcome = run_fault(cluster, case, asks, oracle, before, options)
            print(said(outcome), flush=True)
            found.append(outcome)
        return found
    finally:
        cluster.stop()


def undisturbed(cluster: ServedCluster, asks: list[Ask]) -> Oracle:
    """The answer to each request. Raises `RuntimeError` when not all of them come."""
    with load(cluster.url_of, asks, at_once=AT_ONCE) as history:
        pass
    tokens = {history.tokens_of(ask.number) for ask in asks}
    if history.erred() or len(tokens) != len(asks):
        raise RuntimeError("the undisturbed run failed, or two requests have the same tokens")
    return {ask.number: history.answer_of(ask.number) for ask in asks}


def run_fault(
    cluster: ServedCluster,
    case: Case,
    asks: list[Ask],
    oracle: Oracle,
    before: dict[str, Held],
    options: argparse.Namespace,
) -> Outcome:
    name = VICTIMS[case.victim]
    history = History()
    nemesis = Nemesis(cluster, history)
    cluster.admin("prefix-cache:reset", "POST")
    with (
        watched(cluster) as placements,
        load(cluster.url_of, asks, at_once=AT_ONCE, history=history),
    ):
        history.wait_for_ends(len(asks) // 3)
        began = time.monotonic()
        pid = nemesis.kill(name) if case.action == "kill" else nemesis.stop(name)
        took_place = time.monotonic()
        if case.action == "stall":
            time.sleep(options.stall_seconds)  # how long the fault lasts
            nemesis.resume(pid)
        noticed = time.monotonic() + UNNOTICED_SECONDS
        is_killed = case.action == "kill"
        eventually(
            lambda: cluster.is_whole() and not (is_killed and cluster.runs_as(name, pid)),
            WHOLE_WITHIN_SECONDS,
        )
        whole = time.monotonic() - began
    in_flight = flying(history, placements, name, Span(began, took_place, noticed))
    leaks = await_quiescence(cluster, before)
    errors = Counter(e.detail for e in history.events if e.kind in ("failed", "refused", "broken"))
    return Outcome(
        case=case,
        num_requests=len(asks),
        num_wrong=wrong_tokens(history, oracle),
        num_hung=hung(history),
        leaks=leaks,
        errors=errors,
        num_in_flight=len(in_flight),
        recovery=recovery_of(history, began),
        whole=whole,
        violations=violations(
            history,
            oracle,
            may_break=in_flight if name == "gateway" else (),
            may_err=in_flight,
        ),
    )


@dataclass(frozen=True, slots=True)
class Span:
    """Moments of one fault: before it was made, when it was verified, when it was over or known."""

    began: float
    took_place: float
    noticed: float


def flying(history: History, placements: Placements, name: str, span: Span) -> set[int]:
    """Requests that a process carried when the fault came, or was given before it was noticed."""
    if name == "redis":
        return set()  # no request runs there
    sent = {e.request for e in history.events if e.kind == "sent" and e.at <= span.took_place}
    ended = {e.request for e in history.events if e.kind in LAST and e.at <= span.began}
    if name == "gateway":
        return sent - ended
    carried = {
        number
        for number, nodes in placements.last_before(span.began).nodes_of.items()
        if name in nodes
    }
    return (carried - ended) | placements.touched(name, since=span.began, until=span.noticed)


def recovery_of(history: History, began: float) -> float:
    """Seconds from the fault to the last error, or the longest silence after it."""
    bad = [e.at - began for e in history.events if e.kind in ("failed", "refused", "broken")]
    silences = [
        later.at - max(earlier.at, began)
        for events in history.by_request().values()
        for earlier, later in itertools.pairwise(events)
        if later.at > began
    ]
    return max([0.0, *bad, *silences])


def said(outcome: Outcome) -> str:
    case = outcome.case
    problems = [*outcome.leaks, *outcome.violations]
    return (
        f"{case.policy}, seed {case.seed}: {case.action} {case.victim}: "
        f"{outcome.num_requests} requests, {outcome.num_wrong} wrong, {outcome.num_hung} hung, "
        f"{len(outcome.leaks)} leaks, {outcome.num_errors} errors of {outcome.num_in_flight} in "
        f"flight {dict(outcome.errors) or ''}, recovery {outcome.recovery:.1f} s, "
        f"whole after {outcome.whole:.1f} s" + "".join(f"\n    {each}" for each in problems)
    )


HEAD = (
    "policy",
    "fault",
    "requests",
    "wrong tokens",
    "hung",
    "leaks",
    "errors / in flight",
    "recovery (s)",
    "whole again (s)",
)


def table(outcomes: Sequence[Outcome]) -> str:
    """One row for each policy and fault; what was measured for each seed, worst case last."""
    rows: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        case = outcome.case
        rows.setdefault((case.policy, f"{case.action} {case.victim}"), []).append(outcome)
    lines = [HEAD, ("---", "---", *["---:"] * (len(HEAD) - 2))]
    for (policy, fault), found in rows.items():
        lines.append(
            (
                policy,
                fault,
                str(sum(each.num_requests for each in found)),
                str(sum(each.num_wrong for each in found)),
                str(sum(each.num_hung for each in found)),
                str(sum(len(each.leaks) for each in found)),
                ", ".join(f"{each.num_errors}/{each.num_in_flight}" for each in found),
                ", ".join(f"{each.recovery:.1f}" for each in found),
                ", ".join(f"{each.whole:.1f}" for each in found),
            )
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def text(outcomes: Sequence[Outcome], options: argparse.Namespace, argv: Sequence[str]) -> str:
    """The section of RESULTS.md."""
    cores = os.cpu_count() or 1
    facts = [
        f"command: `python -m tests.faults.kill_table {' '.join(argv)}`",
        f"`baton serve --prefill 2 --decode 2 --dtype float32`, the bundled model; {AT_ONCE} "
        f"requests at once, {options.requests} for each fault and seed, {options.tokens} tokens "
        f"each; the fault comes when a third has ended; a stall lasts {options.stall_seconds:g} s",
        "values with commas: one for each seed. Errors: requests that ended in one, against those "
        "that were in flight on the process. Recovery: from the fault to the last error, or the "
        "longest silence on any stream. A stalled gateway is one that its clients wait for",
        "wrong tokens: against an undisturbed run of the same requests; leaks: blocks, transfers, "
        "leases, sequences, descriptors, threads and tasks held once all was quiet",
        f"load average at the end: {os.getloadavg()[0]:.1f} on {cores} cores",
        *machine_facts(),
    ]
    return table(outcomes) + "\n\n" + "\n".join(f"- {fact}" for fact in facts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
