"""Invariant I4: once nothing is asked any more, nothing is held any more.

1. `baseline` notes of each process what it holds when it is idle: descriptors, threads and
   tasks of its event loop.
2. `leaks` says in words what is held beyond that: blocks, transfers, leases, sequences,
   requests at the gateway. It asks every node itself, not what its heartbeat said.
3. `await_quiescence` repeats it until nothing is found, or says what stayed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cluster.redis_client import MAX_CONNECTIONS
from tests.faults.metrics import Scrape, scrape

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

QUIET_WITHIN_SECONDS = 45.0
POLL_SECONDS = 0.25
# Connections to peers that came back, channels that close with a pause, threads of pools. A store
# keeps as many connections to Redis as it ever needed at once, which a busy machine decides.
MORE_DESCRIPTORS, MORE_THREADS, MORE_TASKS = MAX_CONNECTIONS + 8, 24, 24
IDLE_GAUGES = (
    "baton_sequences_running",
    "baton_sequences_waiting",
    "baton_queued_tokens",
    "baton_kv_transfers_in_flight",
    "baton_kv_lost_blocks",
)


class Checked(Protocol):
    """A running cluster."""

    @property
    def names(self) -> Sequence[str]:
        """Of nodes and gateways."""

    @property
    def node_names(self) -> Sequence[str]: ...
    def child(self, name: str) -> int:
        """The pid of a program, or of "redis"."""

    def metrics_address(self, name: str) -> str: ...
    def admin(self, path: str) -> Any: ...
    def nodes(self) -> dict[str, dict[str, Any]]: ...


@dataclass(frozen=True, slots=True)
class Held:
    """What one process holds."""

    num_descriptors: int
    num_threads: int
    num_tasks: int
    resident_bytes: int


def held_by(pid: int, metrics: Scrape | None = None) -> Held:
    """Raises `OSError` when the process is gone."""
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return Held(
        num_descriptors=len(list(Path(f"/proc/{pid}/fd").iterdir())),
        num_threads=int(status["Threads"]),
        num_tasks=0 if metrics is None else round(metrics.value("baton_event_loop_tasks")),
        resident_bytes=int(status["VmRSS"].split()[0]) * 1024,
    )


def baseline(cluster: Checked) -> dict[str, Held]:
    """Of each program by name, at a moment when nothing runs."""
    found = {
        name: held_by(cluster.child(name), scrape(cluster.metrics_address(name)))
        for name in cluster.names
    }
    return {**found, "redis": held_by(cluster.child("redis"))}


def leaks(cluster: Checked, before: dict[str, Held]) -> list[str]:
    """Everything that is held now and should not be, in words."""
    found: list[str] = []
    for name in cluster.names:
        try:
            metrics = scrape(cluster.metrics_address(name))
            now = held_by(cluster.child(name), metrics)
        except (OSError, LookupError) as error:
            found.append(f"{name}: does not answer ({error})")
            continue
        found += [f"{name}: {problem}" for problem in more_than(before[name], now)]
        check = held_by_node if name in cluster.node_names else held_by_gateway
        found += [f"{name}: {problem}" for problem in check(metrics)]
    return found + list(_of_cluster(cluster))


def await_quiescence(cluster: Checked, before: dict[str, Held]) -> list[str]:
    """Leaks that are still there when everything has had time to end."""
    deadline = time.monotonic() + QUIET_WITHIN_SECONDS
    while True:
        found = leaks(cluster, before)
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(POLL_SECONDS)


def more_than(before: Held, now: Held) -> Iterator[str]:
    for what, allowed in (
        ("num_descriptors", MORE_DESCRIPTORS),
        ("num_threads", MORE_THREADS),
        ("num_tasks", MORE_TASKS),
    ):
        was, is_now = getattr(before, what), getattr(now, what)
        if is_now > was + allowed:
            yield f"{is_now} {what.removeprefix('num_')}, {was} when it was idle"


def held_by_node(metrics: Scrape) -> Iterator[str]:
    """A name that nothing is told under any more would hide all leaks of its kind."""
    blocks = metrics.by("baton_kv_blocks", "state")
    slots = metrics.by("baton_kv_staging_slots", "state")
    for what, counted, states in (
        ("blocks", blocks, ("used", "quarantined")),
        ("staging slots", slots, ("taken", "lost")),
    ):
        for state in states:
            if state not in counted:
                yield f"nothing is told of {what} {state}"
            elif counted[state]:
                yield f"{counted[state]} {what} {state}"
    for gauge in IDLE_GAUGES:
        if not metrics.has(gauge):
            yield f"{gauge} is not told"
        elif value := metrics.value(gauge):
            yield f"{gauge} is {value:.0f}"


def held_by_gateway(metrics: Scrape) -> Iterator[str]:
    for state, count in metrics.by("baton_sequences_in_flight", "state").items():
        if count:
            yield f"{count} sequences {state}"
    if tokens := metrics.value("baton_queued_prompt_tokens"):
        yield f"{tokens:.0f} prompt tokens queued"


def _of_cluster(cluster: Checked) -> Iterator[str]:
    try:
        answer = cluster.admin("leases")
        requests = cluster.admin("requests")["requests"]
        nodes = cluster.nodes()
    except OSError as error:
        yield f"the admin API does not answer ({error})"
        return
    for lease in answer["leases"]:
        yield f"{lease['node']}: a lease of {lease['num_blocks']} blocks, {lease['state']}"
    for name in answer["unreachable"]:
        yield f"{name}: does not say what it leases"
    if requests:
        yield f"the gateway has {len(requests)} requests in flight"
    for name, node in nodes.items():
        load = node["load"]
        if load["num_free_blocks"] != load["num_blocks"]:
            yield f"{name}: {load['num_free_blocks']} of {load['num_blocks']} blocks are free"
