"""What benchmarks publish can be taken again: with the command that was given, to the letter."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from benchmarks.command import parser_of, with_facts

if TYPE_CHECKING:
    import pytest


def test_figures_stand_beside_the_command_as_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks/memory.py", "--ranks", "2", "--write"])
    lines = with_facts("memory", "| GPU |", ["a fact"]).splitlines()
    command = "- command: `python -m benchmarks.memory --ranks 2 --write`"
    assert lines[:4] == ["| GPU |", "", command, "- a fact"]
    assert lines[4].startswith("- date: ")


def test_nothing_is_published_unless_asked_for() -> None:
    parser = parser_of("memory", __doc__)
    assert not parser.parse_args([]).write
    assert parser.parse_args(["--write"]).write
