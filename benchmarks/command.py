"""What all benchmarks are as commands: help, `--write`, and figures beside how they were taken."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from benchmarks.results_file import machine_facts, write_section

if TYPE_CHECKING:
    from collections.abc import Iterable


def parser_of(program: str, doc: str | None) -> argparse.ArgumentParser:
    """Of `python -m benchmarks.<program>`, whose docstring is its help."""
    parser = argparse.ArgumentParser(
        f"python -m benchmarks.{program}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--write", action="store_true", help="update benchmarks/RESULTS.md")
    return parser


def command_of(program: str) -> str:
    """As it was given, which is what anyone has to type for the same figures."""
    return " ".join([f"python -m benchmarks.{program}", *sys.argv[1:]])


def with_facts(program: str, table: str, facts: Iterable[str] = ()) -> str:
    """A table, and behind it the command, these facts, and those of the machine."""
    told = [f"command: `{command_of(program)}`", *facts, *machine_facts()]
    return "\n".join([table, "", *(f"- {fact}" for fact in told)])


def publish(program: str, name: str, title: str, table: str, facts: Iterable[str] = ()) -> None:
    """Into the section of this name, with all its facts."""
    write_section(name, title, with_facts(program, table, facts))
