"""All programs help in one voice: the same frame, the same words where they mean the same."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from baton.__main__ import main
from baton.admin import COMMANDS

if TYPE_CHECKING:
    from collections.abc import Sequence

PROGRAMS = [
    ["serve"],
    ["gateway"],
    ["bench", "run"],
    ["doctor"],
    *(["admin", *command.name.split()] for command in COMMANDS),
]
FAMILIES = [[], ["admin"], ["bench"]]


def code_of(typed: Sequence[str]) -> object:
    try:
        return main(typed)
    except SystemExit as ended:
        return ended.code


def help_of(program: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert code_of([*program, "--help"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("program", PROGRAMS, ids=" ".join)
def test_help_of_options_has_one_frame(
    program: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    text = help_of(program, capsys)
    lines = text.splitlines()
    assert re.fullmatch(
        rf"usage: baton {' '.join(program)}( \[?[A-Z]+\]?)?( \.\.\.)? \[options\]", lines[0]
    )
    assert re.fullmatch(r"[A-Z].+\.", lines[2]), "a sentence on what it does"
    assert lines[4] == "General:"
    titles = [line for line in lines if re.fullmatch(r"\S.*:", line)]
    assert all(title[0].isupper() for title in titles)
    told = " ".join(text.split())
    assert re.search(r"is also an environment variable, --([a-z-]+) as BATON_[A-Z_]+, and", told)


@pytest.mark.parametrize("program", FAMILIES, ids=["baton", "admin", "bench"])
def test_help_of_commands_has_one_frame(
    program: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = help_of(program, capsys).splitlines()
    name = " ".join(["baton", *program])
    assert lines[0] == f"usage: {name} COMMAND [options]"
    assert re.fullmatch(r"[A-Z].+\.", lines[2])
    assert any(line.startswith("  ") for line in lines)
    assert any(f"`{name} COMMAND --help` lists the options" in line for line in lines)


def test_an_admin_option_may_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BATON_ADMIN_URL", "http://10.0.0.1:8001")
    assert main(["admin", "nodes", "--show-config"]) == 0
    shown = capsys.readouterr().out
    assert 'admin_url: "http://10.0.0.1:8001"' in shown
    assert "environment BATON_ADMIN_URL" in shown


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (["nodez"], "there is no command 'nodez'; there are: nodes, requests, leases"),
        (["policy"], "there is no command 'policy'; there are: policy get, policy set."),
        (["cordon"], "NODE is required (also as --node, BATON_NODE, or node in the config file)"),
        (["nodes", "--jason"], "unknown flag --jason"),
    ],
)
def test_a_mistake_in_an_admin_command_is_one_line_and_a_usage_error(
    capsys: pytest.CaptureFixture[str], typed: list[str], told: str
) -> None:
    assert main(["admin", *typed]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("baton admin")
    assert told in line
