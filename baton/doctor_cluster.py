"""`baton doctor --cluster`: how fast KV moves between the nodes of a running cluster.

1. The gateway's admin API names the nodes. Every prefill node is paired with every decode node that
   can read its KV.
2. One pair after the other hands spare blocks off, by its own transport, with tickets and digests,
   and copies plain bytes between the same two. Nodes that are at work are left alone.
3. A row says what carried the KV, at what rate, beside the plain copy; and what to look at where it
   is slow, or why it could not be measured.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from baton.admin_client import AdminRefused, AdminUnreachable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from baton.admin_client import AdminClient

MEASURE_SECONDS = 60.0
SLOW_SHARE = 0.5  # of the plain copy: a hand-off reads and writes the pool and digests all of it
SMALL_BYTES = 8 << 20  # below it, what a hand-off takes besides its bytes shows
SMALL_UNIT_BYTES = 32 << 10  # below it, what each unit takes besides its bytes shows
FAST = ("rdma", "cuda_ipc")


class PairVerdict(StrEnum):
    OK = "ok"
    SLOW = "slow"
    NOT_MEASURED = "not measured"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodePair:
    """Rates are bytes per second, 0 where `note` says why there is none."""

    prefill: str
    decode: str
    verdict: PairVerdict
    note: str = ""
    transport: str = ""
    num_bytes: int = 0
    unit_bytes: int = 0  # of one layer of one block
    rate: float = 0.0
    reference: str = ""
    reference_rate: float = 0.0

    @property
    def label(self) -> str:
        return f"{self.prefill} to {self.decode}"

    @property
    def share(self) -> float:
        return self.rate / self.reference_rate if self.reference_rate else 0.0


def measure_cluster(client: AdminClient) -> list[NodePair]:
    """Raises `AdminUnreachable` and `AdminRefused` when the nodes cannot be listed."""
    measured = []
    for prefill, decode in pairs_of(client.get("/nodes")):
        print(f"measuring {prefill} to {decode} …", file=sys.stderr)
        measured.append(_measure(client, prefill, decode))
    return measured


def pairs_of(document: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Names of those that exchange KV. Raises `AdminUnreachable` when it is no list of nodes."""
    try:
        nodes = [
            (str(node["role"]), str(node["name"]), str(node["compatibility_hash"]))
            for node in document["nodes"]
        ]
    except (KeyError, TypeError):
        raise AdminUnreachable("It answers, but not as a Baton admin API.") from None
    for role, prefill, layout in sorted(nodes):
        if role == "prefill":
            for other_role, decode, other_layout in sorted(nodes):
                if other_role == "decode" and other_layout == layout:
                    yield prefill, decode


def _measure(client: AdminClient, prefill: str, decode: str) -> NodePair:
    """Never raises: a pair that cannot be measured is a row that says why."""
    try:
        found = client.post(
            "/hand-offs:measure", {"prefill": prefill, "decode": decode}, MEASURE_SECONDS
        )
        return judged(
            NodePair(
                prefill=prefill,
                decode=decode,
                verdict=PairVerdict.OK,
                transport=str(found["transport"]),
                num_bytes=int(found["num_bytes"]),
                unit_bytes=int(found["unit_bytes"]),
                rate=float(found["bytes_per_second"]),
                reference=str(found["reference"]),
                reference_rate=float(found["reference_bytes_per_second"]),
            ),
            on_gpu=found.get("device") == "cuda",
        )
    except (AdminRefused, AdminUnreachable) as error:
        note = error.message.partition(" (HTTP ")[0]
    except (KeyError, TypeError, ValueError):
        note = "the gateway did not answer in its own words"
    return NodePair(prefill=prefill, decode=decode, verdict=PairVerdict.NOT_MEASURED, note=note)


def judged(pair: NodePair, *, on_gpu: bool) -> NodePair:
    """The same with a verdict and what to look at. What says little is no reason for an alarm."""
    notes = []
    is_slow = False
    if pair.num_bytes < SMALL_BYTES:
        size = f"{pair.num_bytes / 2**20:.1f} MiB"
        notes.append(f"few KV blocks were spare: {size} say little")
    elif pair.share < SLOW_SHARE and pair.unit_bytes < SMALL_UNIT_BYTES:
        size = f"{pair.unit_bytes / 2**10:.1f} KiB"
        notes.append(f"a small model: blocks have {size} a layer, and their number counts")
    elif pair.share < SLOW_SHARE:
        is_slow = True
        notes.append("far below the plain copy: is a machine busy?")
    if on_gpu and pair.transport not in FAST:
        notes.append("through host memory: see --require-transport")
    verdict = PairVerdict.SLOW if is_slow else PairVerdict.OK
    return NodePair(**{**asdict(pair), "verdict": verdict, "note": "; ".join(notes)})


LEGEND = (
    "Spare KV blocks, handed off with tickets and digests, beside plain bytes between the same two."
)
_STYLES = {PairVerdict.OK: "green", PairVerdict.SLOW: "yellow", PairVerdict.NOT_MEASURED: "red"}


def cluster_table(pairs: Sequence[NodePair]) -> Group:
    """Notes stand below: beside the figures they would be cut on a narrow terminal."""
    table = Table(box=None, pad_edge=False)
    for heading in ("KV from", "to", "by", "GB/s", "plain copy", "GB/s", "share", "verdict"):
        is_number = heading in ("GB/s", "share")
        table.add_column(heading, justify="right" if is_number else "left", no_wrap=True)
    for pair in pairs:
        rates = ("-",) * 5
        if pair.rate:
            rates = (
                escape(pair.transport),
                f"{pair.rate / 1e9:.2f}",
                escape(pair.reference),
                f"{pair.reference_rate / 1e9:.2f}",
                f"{pair.share:.2f}x",
            )
        style = _STYLES[pair.verdict]
        verdict = f"[{style}]{pair.verdict}[/{style}]"
        table.add_row(escape(pair.prefill), escape(pair.decode), *rates, verdict)
    return Group(table, *(Text(f"{pair.label}: {pair.note}") for pair in pairs if pair.note))
