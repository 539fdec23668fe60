"""How a start is shown: a row per process on a terminal, lines elsewhere, errors once."""

from __future__ import annotations

import io

from rich.console import Console

from baton.child import Child, ChildSpec, Facts
from baton.progress import StartupView


def child(name: str = "decode-0") -> Child:
    spec = ChildSpec(name, ("decode",))
    return Child(spec, on_fact=lambda _, fact: None, on_line=lambda _, line: None)


class Screen:
    def __init__(self, *, is_terminal: bool) -> None:
        self.output = io.StringIO()
        self.console = Console(file=self.output, force_terminal=is_terminal, width=100)
        self.view = StartupView(self.console)
        self.child: Child | None = None

    def take(self, *facts: Facts, of: Child) -> None:
        for fact in facts:
            self.view.take_fact(of, fact)

    @property
    def text(self) -> str:
        return self.output.getvalue()


BEGIN = {"event": "begin", "phase": "load weights", "total": 10}
ADVANCE = {"event": "advance", "phase": "load weights", "done": 5, "total": 10}
END = {"event": "end", "phase": "load weights", "seconds": 1.25}
READY = {"event": "ready", "seconds": 2.5}
FAILED = {"event": "failed", "message": "no weights"}
DIED = {"event": "died", "exit_code": -9, "pause_seconds": 0.5, "message": "port taken"}


def lines_of(*facts: Facts) -> list[str]:
    async_child = child()
    screen = Screen(is_terminal=False)
    with screen.view:
        screen.take(*facts, of=async_child)
    return [line.strip() for line in screen.text.splitlines()]


def test_off_a_terminal_each_phase_is_a_line_when_it_ends() -> None:
    assert lines_of(BEGIN, ADVANCE, END, READY) == [
        "decode-0 | load weights: 1.25 s",
        "decode-0 | ready in 2.50 s",
    ]


def test_a_failure_is_left_to_who_ends_the_start() -> None:
    assert lines_of(FAILED) == []


def test_a_death_is_said_with_its_reason_and_what_comes_next() -> None:
    (line,) = lines_of(DIED)
    assert line == "decode-0 | was ended by SIGKILL (port taken); starting again in 0.5 s"
    (line,) = lines_of(DIED | {"message": None})
    assert line == "decode-0 | was ended by SIGKILL; starting again in 0.5 s"
    (line,) = lines_of(DIED | {"message": None, "exit_code": 1})
    assert line == "decode-0 | died with exit code 1; starting again in 0.5 s"
    (line,) = lines_of(DIED | {"message": "it cannot be started: no memory", "exit_code": None})
    assert line == (
        "decode-0 | did not start (it cannot be started: no memory); starting again in 0.5 s"
    )


def test_on_a_terminal_a_row_shows_the_phase_of_each_process() -> None:
    one, other = child("prefill-0"), child("decode-0")
    screen = Screen(is_terminal=True)
    with screen.view:
        screen.take(BEGIN, ADVANCE, of=one)
        screen.take(READY, of=other)
    assert "prefill-0" in screen.text
    assert "load weights" in screen.text
    assert "ready" in screen.text


def test_what_a_child_prints_is_shown_as_it_is() -> None:
    screen = Screen(is_terminal=False)
    screen.view.take_line(child(), "[bold]brackets[/nothing] stay")
    assert screen.text.strip() == "decode-0 | [bold]brackets[/nothing] stay"
