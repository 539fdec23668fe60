"""The figures on the first screen of the README, taken from what RESULTS.md publishes.

python -m benchmarks.readme_figures     after a table that they come from was published anew
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
BEGIN, END = "<!-- figures: begin -->\n", "<!-- figures: end -->"
HEADING = "| two NVIDIA H200, Llama-3.1-8B shape | Baton | beside it | |\n|---|---:|---:|---|\n"


@dataclass(frozen=True, slots=True)
class Cell:
    """Of the first row of a table that has these texts in these columns."""

    table: str  # the name in its `begin` mark
    row: dict[int, str]
    column: int


@dataclass(frozen=True, slots=True)
class Figure:
    name: str
    ours: Cell
    reference: Cell
    what: str  # the reference is


SPLIT, BESIDE, MOVED, PREFIX, ENGINE = (
    "split pools",
    "decode while receiving",
    "KV transfer, two GPUs",
    "prefix_fetch",
    "engine llama-3.1-8b",
)
PEER = "vLLM 0.25.1, another day"


def _split(column: int, what: str) -> Cell:
    return Cell(SPLIT, {0: "8192", 1: "1", 2: what}, column)


FIGURES = (
    Figure(
        "first token of 8192 tokens, split (ms)",
        _split(3, "split pools"),
        _split(3, "one node doing both"),
        "one node doing both",
    ),
    Figure(
        "what of the hand-off shows then, between the first two tokens (ms)",
        _split(7, "split pools"),
        _split(6, "split pools"),
        "a decode step",
    ),
    Figure(
        "decode, KV arriving as one prefill GPU sends it",
        Cell(BESIDE, {1: "as one prefill GPU computes it"}, 5),
        Cell(BESIDE, {1: "none"}, 5),
        "no KV arriving",
    ),
    Figure(
        "KV from GPU to GPU, a long stream (GB/s)",
        Cell(MOVED, {0: "stream, 8 x 16384 tokens"}, 5),
        Cell(MOVED, {0: "raw copy", 1: "1024"}, 5),
        "a plain copy",
    ),
    Figure(
        "first token of 8192 tokens that another node has cached (ms)",
        Cell(PREFIX, {0: "8192"}, 2),
        Cell(PREFIX, {0: "8192"}, 1),
        "computing them",
    ),
    Figure(
        "prefill of 8192 tokens, one engine (ms)",
        Cell(ENGINE, {0: "prefill 8192"}, 1),
        Cell(ENGINE, {0: "prefill 8192"}, 7),
        PEER,
    ),
    Figure(
        "a decode step at 1024 tokens, one engine (ms)",
        Cell(ENGINE, {0: "decode 1 x 1024"}, 1),
        Cell(ENGINE, {0: "decode 1 x 1024"}, 7),
        PEER,
    ),
)


def value_of(results: str, cell: Cell) -> str:
    """Raises `LookupError` when what was published has no such row any more."""
    table = results.partition(f"<!-- {cell.table}: begin -->")[2]
    for line in table.partition(f"<!-- {cell.table}: end -->")[0].splitlines():
        cells = [text.strip() for text in line.strip().strip("|").split("|")]
        if len(cells) > max(*cell.row, cell.column) and all(
            cells[column] == text for column, text in cell.row.items()
        ):
            return cells[cell.column]
    raise LookupError(f"RESULTS.md has no row {cell.row} in the table '{cell.table}'.")


def table_of(results: str) -> str:
    rows = [
        f"| {each.name} | {value_of(results, each.ours)} | {value_of(results, each.reference)} "
        f"| {each.what} |\n"
        for each in FIGURES
    ]
    return HEADING + "".join(rows)


def with_figures(readme: str, results: str) -> str:
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table_of(results) + END + after


if __name__ == "__main__":
    README.write_text(with_figures(README.read_text(), RESULTS.read_text()))
