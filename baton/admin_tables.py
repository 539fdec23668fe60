"""Tables of `baton admin`: which facts of an entry are shown, and how each reads.

On a terminal they are drawn by rich; elsewhere as plain columns, never cut, for grep and awk.
Whatever the server sent is shown as text: control characters cannot reach the terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

Entry = Mapping[str, Any]

_STATE_STYLES = {
    "ready": "green",
    "cordoned": "yellow",
    "draining": "yellow",
    "drained": "cyan",
    "lost": "red",
    "down": "red",
}


@dataclass(frozen=True, slots=True)
class Column:
    """`read` takes what it shows out of an entry; an entry without it shows as "-"."""

    heading: str
    read: Callable[[Entry], object]
    is_number: bool = False


def _field(name: str) -> Callable[[Entry], object]:
    return lambda entry: entry.get(name)


def _session(entry: Entry) -> object:
    """Whether the gateway that was asked has a session with the node."""
    connected = entry.get("is_connected")
    return None if connected is None else ("up" if connected else "down")


def _load(name: str) -> Callable[[Entry], object]:
    return lambda entry: (entry.get("load") or {}).get(name)


def _blocks_in_use(entry: Entry) -> object:
    """Share of KV blocks that running work holds: cached ones can be taken back."""
    load = entry.get("load") or {}
    total, free = load.get("num_blocks"), load.get("num_free_blocks")
    if not total or free is None:
        return None
    return f"{(total - free) / total:.0%}"


def _seconds(name: str) -> Callable[[Entry], object]:
    def read(entry: Entry) -> object:
        value = entry.get(name)
        return None if value is None else f"{float(value):.1f} s"

    return read


NODES = (
    Column("NODE", _field("name")),
    Column("ROLE", _field("role")),
    Column("STATE", _field("state")),
    Column("SESSION", _session),
    Column("MODEL", _field("model")),
    Column("RUNNING", _load("num_running"), is_number=True),
    Column("WAITING", _load("num_waiting"), is_number=True),
    Column("QUEUED TOKENS", _load("queued_tokens"), is_number=True),
    Column("KV IN USE", _blocks_in_use, is_number=True),
    Column("TRANSFERS", _load("num_transfers"), is_number=True),
    Column("TRANSPORTS", _field("transports")),
    Column("ADDRESS", _field("grpc_address")),
    Column("SEEN", _seconds("age_seconds"), is_number=True),
)
REQUESTS = (
    Column("REQUEST", _field("id")),
    Column("STATE", _field("state")),
    Column("MODEL", _field("model")),
    Column("PREFILL", _field("prefill_node")),
    Column("DECODE", _field("decode_node")),
    Column("PROMPT", _field("prompt_tokens"), is_number=True),
    Column("OUTPUT", _field("output_tokens"), is_number=True),
    Column("AGE", _seconds("age_seconds"), is_number=True),
)
LEASES = (
    Column("LEASE", _field("id")),
    Column("NODE", _field("node")),
    Column("STATE", _field("state")),
    Column("PEER", _field("peer")),
    Column("BLOCKS", _field("num_blocks"), is_number=True),
    Column("LEFT", _seconds("remaining_seconds"), is_number=True),
)


def render_rows(
    rows: Sequence[Entry], columns: Sequence[Column], *, empty: str, console: Console | None = None
) -> None:
    console = console or Console()
    if not rows:
        console.print(empty)
        return
    cells = [[shown(column.read(row)) for column in columns] for row in rows]
    if not console.is_terminal:
        _print_plain([[c.heading.replace(" ", "_") for c in columns], *cells], columns)
        return
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column.heading, justify="right" if column.is_number else "left")
    for row in cells:
        table.add_row(*(Text(cell, style=_STATE_STYLES.get(cell, "")) for cell in row))
    console.print(table)


def render_policy(policy: Entry) -> None:
    for name in sorted(policy):
        print(f"{shown(name)} = {shown(policy[name])}")


def shown(value: object) -> str:
    """One line of printable characters."""
    if value is None or value in ([], ""):
        return "-"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def _print_plain(lines: Sequence[Sequence[str]], columns: Sequence[Column]) -> None:
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        padded = [
            cell.rjust(width) if column.is_number else cell.ljust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        ]
        print("  ".join(padded).rstrip())
