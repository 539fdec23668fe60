"""Take each protective line out of a copy of this tree and run the test that guards it.

    python -m tests.mutations                 all rows, about five minutes on two cores
    python -m tests.mutations --only lease    rows whose bug, report, file or test has the word
    python -m tests.mutations --write         also put the table into benchmarks/RESULTS.md

Prints a table: row, test, red (the test failed, as it must) or green (nothing guards the line).
Ends with an error when a mutation is green, when a test cannot be run, when one fails without any
mutation, or when a protective line is not found any more.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.results_file import machine_facts, write_section
from tests.mutations.catalogue import ROWS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.mutations.row import Mutation, Row

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", ".gpu", "build", "*.egg-info", ".*_cache", "__pycache__", ".hypothesis"
)
TEST_SECONDS = 180.0
TESTS_FAILED = 1  # pytest's exit code; every other but 0 means that nothing was tested


class Outcome(StrEnum):
    RED = "red"
    GREEN = "GREEN"
    BROKEN = "BROKEN"  # the test could not be run


@dataclass(frozen=True, slots=True)
class Result:
    row: Row
    mutation: Mutation
    outcome: Outcome
    seconds: float


def main() -> int:
    options = _options()
    rows = [row for row in ROWS if _has_word(row, options.only)]
    mutations = [mutation for row in rows for mutation in row.mutations]
    if not mutations:
        print(f"No row has the word {options.only!r}.")
        return 1
    for mutation in mutations:
        mutation.applied_to((ROOT / mutation.file).read_text())
    with tempfile.TemporaryDirectory(prefix="baton-mutations-") as name:
        tree = Path(name) / "tree"
        shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
        tests = list(dict.fromkeys(mutation.test for mutation in mutations))
        if _run(tree, tests) != 0:
            print("A test fails although nothing was taken out: look at it first.")
            return 1
        results = list(_results(tree, rows))
    print()
    print(_table(results))
    if options.write and not options.only:
        write_section("bug catalogue", "The bug catalogue, line by line", _published(results))
    return 0 if all(result.outcome is Outcome.RED for result in results) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", default="", metavar="WORD", help="rows that have this word")
    parser.add_argument("--write", action="store_true", help="publish the table")
    return parser.parse_args()


def _has_word(row: Row, word: str) -> bool:
    places = " ".join(f"{mutation.file} {mutation.test}" for mutation in row.mutations)
    return word.lower() in f"{row.bug} {row.reports} {places}".lower()


def _results(tree: Path, rows: Sequence[Row]) -> Iterator[Result]:
    for row in rows:
        for mutation in row.mutations:
            began = time.monotonic()
            outcome = _outcome(tree, mutation)
            result = Result(row, mutation, outcome, time.monotonic() - began)
            print(f"{outcome:6} {result.seconds:5.1f} s  {mutation.test}", flush=True)
            yield result


def _outcome(tree: Path, mutation: Mutation) -> Outcome:
    """With the line taken out of the tree, and put back after."""
    path = tree / mutation.file
    right = path.read_text()
    path.write_text(mutation.applied_to(right))
    try:
        code = _run(tree, [mutation.test])
    finally:
        path.write_text(right)
    if code == 0:
        return Outcome.GREEN
    return Outcome.RED if code == TESTS_FAILED else Outcome.BROKEN


def _run(tree: Path, tests: Sequence[str]) -> int:
    """pytest's exit code; a test that hangs has failed. No byte code is kept: two writes within a
    second could look like one file."""
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            [*command, *tests],
            cwd=tree,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TEST_SECONDS * max(1, len(tests) // 8),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return TESTS_FAILED
    if done.returncode not in (0, TESTS_FAILED):
        print(done.stdout[-2000:], done.stderr[-2000:], sep="\n")
    return done.returncode


def _table(results: Sequence[Result]) -> str:
    lines = ["| bug | test | outcome |", "|---|---|---|"]
    for result in results:
        test = result.mutation.test.rpartition("::")[2].removeprefix("test_").replace("_", " ")
        lines.append(f"| {result.row.bug} | {test} | {result.outcome} |")
    num_red = sum(result.outcome is Outcome.RED for result in results)
    return "\n".join([*lines, "", f"{num_red} of {len(results)} protective lines are guarded."])


def _published(results: Sequence[Result]) -> str:
    """One line a row: what others had, where, how many lines of ours were taken out, how many of
    them a test missed."""
    lines = ["| bug | reports | lines taken out | missed by a test |", "|---|---|---:|---:|"]
    for row in dict.fromkeys(result.row for result in results):
        own = [result.outcome for result in results if result.row is row]
        lines.append(f"| {row.bug} | {row.reports} | {len(own)} | {own.count(Outcome.RED)} |")
    facts = ["command: `python -m tests.mutations --write`", *machine_facts()]
    return "\n".join([*lines, "", *(f"- {fact}" for fact in facts)])


if __name__ == "__main__":
    sys.exit(main())
