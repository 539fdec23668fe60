"""Tables of `baton admin`: which facts of an entry are shown, and how each reads.

On a terminal those columns are shown that fit, in colours, and the others are named below.
Elsewhere all are, with headings of one word, for grep and awk. No value is cut.
Whatever the server sent is shown as text: control characters cannot reach the terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

Entry = Mapping[str, Any]
_GAP = 2  # between two columns

_STATE_STYLES = {
    "ready": "green",
    "cordoned": "yellow",
    "draining": "yellow",
    "drained": "cyan",
    "lost": "red",
    "200": "green",
    "down": "red",
}


@dataclass(frozen=True, slots=True)
class Column:
    """`read` takes what it shows out of an entry; an entry without it shows as "-". Where the
    terminal is too narrow, columns of the highest `rank` are left out first, of rank 0 never."""

    heading: str
    read: Callable[[Entry], object]
    is_number: bool = False
    rank: int = 0


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
        return None if value is None else f"{float(value):.1f}s"

    return read


def _milliseconds(name: str) -> Callable[[Entry], object]:
    def read(entry: Entry) -> object:
        value = entry.get(name)
        return None if value is None else f"{float(value) * 1e3:.0f}ms"

    return read


def _how(entry: Entry) -> object:
    """The code of its error, or what ended its choices."""
    return entry.get("error") or _in_one_word(entry.get("finish"))


def _why(entry: Entry) -> object:
    """A finer cause, or the field that was refused."""
    return entry.get("reason") or entry.get("param")


def _pairs(entry: Entry) -> object:
    return _in_one_word(entry.get("nodes"))


def _in_one_word(text: str | None) -> str | None:
    """For awk."""
    return None if text is None else text.replace(" ", "")


NODES = (
    Column("NODE", _field("name")),
    Column("ROLE", _field("role")),
    Column("STATE", _field("state")),
    Column("SESSION", _session),
    Column("MODEL", _field("model"), rank=6),
    Column("RUNNING", _load("num_running"), is_number=True),
    Column("WAITING", _load("num_waiting"), is_number=True),
    Column("QUEUED TOKENS", _load("queued_tokens"), is_number=True, rank=1),
    Column("KV IN USE", _blocks_in_use, is_number=True),
    Column("TRANSFERS", _load("num_transfers"), is_number=True, rank=3),
    Column("TRANSPORTS", _field("transports"), rank=4),
    Column("ADDRESS", _field("grpc_address"), rank=5),
    Column("SEEN", _seconds("age_seconds"), is_number=True, rank=2),
)
REQUESTS = (
    Column("REQUEST", _field("id")),
    Column("STATE", _field("state")),
    Column("MODEL", _field("model"), rank=3),
    Column("PREFILL", _field("prefill_node")),
    Column("DECODE", _field("decode_node")),
    Column("PROMPT", _field("prompt_tokens"), is_number=True, rank=1),
    Column("OUTPUT", _field("output_tokens"), is_number=True),
    Column("TTFT", _milliseconds("ttft_seconds"), is_number=True),
    Column("AGE", _seconds("age_seconds"), is_number=True),
    Column("RETRIES", _field("num_retries"), is_number=True, rank=2),
)
ENDED = (
    Column("AGO", _seconds("ended_seconds_ago"), is_number=True),
    Column("REQUEST", _field("id")),
    Column("STATUS", _field("status"), is_number=True),
    Column("HOW", _how),
    Column("REASON", _why, rank=1),
    Column("NODES", _pairs, rank=3),
    Column("ROUTE", _field("route"), rank=6),
    Column("MODEL", _field("model"), rank=7),
    Column("PROMPT", _field("prompt_tokens"), is_number=True, rank=5),
    Column("OUTPUT", _field("output_tokens"), is_number=True, rank=4),
    Column("TTFT", _milliseconds("ttft_seconds"), is_number=True, rank=2),
    Column("TOOK", _seconds("duration_seconds"), is_number=True),
    Column("RETRIES", _field("num_retries"), is_number=True, rank=2),
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
    if not console.is_terminal:
        _draw([column.heading.replace(" ", "_") for column in columns], rows, columns, console)
        return
    fitting = columns_that_fit(rows, columns, console.width)
    _draw([column.heading for column in fitting], rows, fitting, console)
    left_out = ", ".join(column.heading for column in columns if column not in fitting)
    if left_out:
        console.print(f"Too narrow for {left_out}; -o json has all.", style="dim")


def remarks_on(rows: Sequence[Entry]) -> Iterator[str]:
    """What no column tells: ready, and yet without work for ever; or without work, and yet not
    drained; or a pair of nodes that take work, but not from each other."""
    roles = {row.get("role") for row in rows}
    for row in rows:
        if row.get("awaited_gateways"):
            yield (
                f"{shown(row.get('name'))} drains, and waits until nothing is on its way there any "
                f"more from {shown(row['awaited_gateways'])}."
            )
        if row.get("num_partners") == 0 and len(roles) > 1:
            yield (
                f"{shown(row.get('name'))} can exchange KV with no node of the other role: model, "
                "KV layout, block size or version differ."
            )
        if row.get("role") == "prefill":  # a pair is told by both of its nodes
            yield from map(_remark_on_pair, row.get("pairs_held_back") or ())


def _remark_on_pair(pair: Entry) -> str:
    seconds = float(pair.get("tried_again_in_seconds") or 0.0)
    return (
        f"{shown(pair.get('prefill_node'))} > {shown(pair.get('decode_node'))} is held back: "
        f"hand-offs between them fail ({shown(pair.get('reason'))}). It is tried again "
        f"{f'in {seconds:.0f} s' if seconds else 'with the next request that would go there'}."
    )


def columns_that_fit(
    rows: Sequence[Entry], columns: Sequence[Column], width: int
) -> Sequence[Column]:
    """Those that `width` has room for, in order; those of rank 0 in any case."""
    while sum(_widths(rows, columns)) + _GAP * (len(columns) - 1) > width:
        least = max(columns, key=lambda column: column.rank)
        if least.rank == 0:
            break
        columns = [column for column in columns if column is not least]
    return columns


def _widths(rows: Sequence[Entry], columns: Sequence[Column]) -> list[int]:
    return [
        max(len(column.heading), *(len(shown(column.read(row))) for row in rows))
        for column in columns
    ]


def _draw(
    headings: Sequence[str], rows: Sequence[Entry], columns: Sequence[Column], out: Console
) -> None:
    """Aligned columns. A line that is longer than the terminal is left to it: nothing is cut."""
    cells = [[shown(column.read(row)) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    for number, line in enumerate((headings, *cells)):
        text = Text()
        for cell, width, column in zip(line, widths, columns, strict=True):
            style = "bold" if number == 0 else _STATE_STYLES.get(cell, "")
            space = " " * (width - len(cell))
            text.append(space if column.is_number else "").append(cell, style)
            text.append(" " * _GAP if column.is_number else space + " " * _GAP)
        text.rstrip()
        out.print(text, soft_wrap=True, highlight=False)


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
