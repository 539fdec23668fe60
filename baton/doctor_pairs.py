"""`baton doctor --pairs`: how fast KV moves between two devices of this machine.

1. The pairs: two processes in host memory, by each way there is; every two GPUs.
2. Two machines: one listens, the other measures to it. No cluster on them is touched.
3. Each is measured by `pair_probe.py` in processes of its own, one pair after the other.
4. A row says what carried the bytes, at what rate, beside the plain copy of the same two, and
   what to look at when that is far away or when it is not the transport one would expect.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from baton.pair_plan import host_and_port

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PAIR_SECONDS = 90.0
MACHINE_SECONDS = 180.0
GOOD_SHARE = 0.7  # of the plain copy


@dataclass(frozen=True, slots=True)
class Pair:
    """`tls`: the transports UCX may take; "all" as it likes."""

    label: str
    source: str
    target: str
    tls: str


@dataclass(frozen=True, slots=True)
class MeasuredPair:
    """Rates are bytes per second, 0 where `note` says why there is none."""

    label: str
    transport: str
    rate: float
    reference: str
    reference_rate: float
    note: str

    @property
    def share(self) -> float:
        return self.rate / self.reference_rate if self.reference_rate else 0.0


def measure_pairs() -> list[MeasuredPair]:
    measured = []
    for pair in all_pairs(_count_gpus()):
        print(f"measuring {pair.label} …", file=sys.stderr)
        measured.append(measure_pair(pair))
    return measured


def measure_machine(address: str, device: str) -> MeasuredPair:
    """From this machine to one where `baton doctor --listen` runs, at HOST:PORT."""
    host, port = host_and_port(address)
    label = f"this machine to {address}"
    found = _measured(label, ["to", device, host, str(port)], MACHINE_SECONDS)
    return found if found.note else replace(found, note=note_between(found))


def note_between(found: MeasuredPair) -> str:
    """Between machines one hopes for RDMA."""
    if found.transport in ("rdma", "cuda_ipc"):
        return ""
    return "no RDMA: see --require-transport rdma" + (
        "" if found.share >= GOOD_SHARE else ", and far below a plain socket"
    )


def all_pairs(num_gpus: int) -> Iterator[Pair]:
    """GPU pairs in one direction: links are alike both ways."""
    yield Pair("two processes, as they choose", "cpu", "cpu", "all")
    yield Pair("two processes over shared memory", "cpu", "cpu", "sm,tcp")
    for source in range(num_gpus):
        for target in range(source + 1, num_gpus):
            yield Pair(f"GPU {source} to GPU {target}", f"cuda:{source}", f"cuda:{target}", "all")


def measure_pair(pair: Pair) -> MeasuredPair:
    """Never raises: a probe that fails is a row that says how."""
    found = _measured(pair.label, [pair.source, pair.target, pair.tls], PAIR_SECONDS)
    return found if found.note else replace(found, note=note_on(pair, found))


def _measured(label: str, arguments: Sequence[str], seconds: float) -> MeasuredPair:
    """By a probe with these arguments. Without a rate it has a note that says why."""
    try:
        done = _run_probe("baton.pair_probe", *arguments, seconds=seconds)
    except subprocess.TimeoutExpired:
        return _failed(label, f"no answer within {seconds:.0f} s")
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return _failed(label, f"exit code {done.returncode}: {last}")
    try:
        facts = json.loads((done.stdout.splitlines() or [""])[-1])
        if "failed" in facts:
            return _failed(label, str(facts["failed"]))
        return MeasuredPair(
            label=label,
            transport=str(facts["transport"]),
            rate=float(facts["rate"]),
            reference=str(facts["reference"]),
            reference_rate=float(facts["reference_rate"]),
            note="",
        )
    except (ValueError, TypeError, KeyError):
        return _failed(label, "the probe did not answer in its own words")


def note_on(pair: Pair, found: MeasuredPair) -> str:
    """What to look at; empty when all is as it should be."""
    if pair.source != "cpu" and found.transport != "cuda_ipc":
        return (
            "not over NVLink: through host memory. See `nvidia-smi topo -m`, UCX_TLS and, in "
            "containers, whether both see each other's processes"
        )
    if "sm" in pair.tls.split(",") and found.transport != "shm":
        return "UCX found no shared memory between these processes"
    if found.transport == "shm":
        return "for comparison: nodes do not take it unless told by --ucx-tls"
    if found.share < GOOD_SHARE:
        return "far below the plain copy: is the machine busy?"
    return ""


def pair_table(pairs: Sequence[MeasuredPair]) -> Group:
    """Notes stand below: beside the figures they would be cut on a narrow terminal."""
    table = Table(box=None, pad_edge=False)
    for heading in ("KV between", "carried by", "GB/s", "plain copy", "GB/s", "share"):
        is_number = heading in ("GB/s", "share")
        table.add_column(heading, justify="right" if is_number else "left", no_wrap=is_number)
    for pair in pairs:
        if not pair.rate:
            table.add_row(escape(pair.label), "-", "-", "-", "-", "-")
            continue
        table.add_row(
            escape(pair.label),
            escape(pair.transport),
            f"{pair.rate / 1e9:.2f}",
            escape(pair.reference),
            f"{pair.reference_rate / 1e9:.2f}",
            f"{pair.share:.2f}x",
        )
    return Group(table, *(_note(pair) for pair in pairs if pair.note))


def _note(pair: MeasuredPair) -> Text:
    return Text(f"{pair.label}: {pair.note}", style="" if pair.rate else "red")


def _run_probe(
    program: str, *arguments: str, seconds: float = PAIR_SECONDS
) -> subprocess.CompletedProcess[str]:
    """Apart: torch and UCX may crash, and the machine of a gateway has neither."""
    command = [sys.executable, "-m", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)


def _count_gpus() -> int:
    """As torch sees them, asked in a process of its own."""
    try:
        return int(_run_probe("baton.doctor_probe", "gpus").stdout.splitlines()[-1])
    except (ValueError, IndexError, subprocess.TimeoutExpired):
        return 0


def _failed(label: str, why: str) -> MeasuredPair:
    return MeasuredPair(label, "", 0.0, "", 0.0, why)
