"""How `baton serve` shows its start: a row per process, or a line per phase off a terminal."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from types import TracebackType

    from baton.child import Child, Facts

BAR_WIDTH = 24


class _Row:
    """The latest of one process: its phase, how far it is, how long it took."""

    def __init__(self, phase: str = "starting") -> None:
        self.began = time.monotonic()
        self.phase = phase
        self.done: int | None = None
        self.total: int | None = None
        self.seconds: float | None = None

    def take(self, fact: Facts) -> None:
        match fact["event"]:
            case "begin":
                self.phase, self.done, self.total = fact["phase"], 0, fact["total"]
            case "advance":
                self.done, self.total = fact["done"], fact["total"]
            case "ready":
                self.phase, self.seconds, self.total = "ready", fact["seconds"], None
            case "failed":
                self.phase = "failed"


class StartupView:
    """Draws rows while the cluster starts; afterwards passes log lines through."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rows: dict[str, _Row] = {}
        self._live: Live | None = None
        if console.is_terminal:
            self._live = Live(console=console, refresh_per_second=8, get_renderable=self._render)

    def __enter__(self) -> StartupView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def take_fact(self, child: Child, fact: Facts) -> None:
        """A failure is marked here and said, once, by who waits for the start."""
        if fact["event"] == "died":
            phase = f"{_death(fact['exit_code'])}; starting again"
            self._rows[child.spec.name] = _Row(phase)
        self._rows.setdefault(child.spec.name, _Row()).take(fact)
        quiet = self._live is not None and self._live.is_started
        if quiet or fact["event"] in ("begin", "advance", "failed"):
            return
        self.take_line(child, _describe(fact))

    def take_line(self, child: Child, line: str) -> None:
        label = Text(f"{child.spec.name:>10} | ", style="cyan")
        self._console.print(label + Text(line), soft_wrap=True, highlight=False)

    def _render(self) -> Group:
        table = Table.grid(padding=(0, 2))
        for name, row in self._rows.items():
            table.add_row(Text(name, style="bold"), _phase(row), _bar(row), _clock(row))
        return Group(table)


def _describe(fact: Facts) -> str:
    match fact["event"]:
        case "end":
            return f"{fact['phase']}: {fact['seconds']:.2f} s"
        case "ready":
            return f"ready in {fact['seconds']:.2f} s"
        case "died":
            why = f" ({fact['message']})" if fact["message"] else ""
            return (
                f"{_death(fact['exit_code'])}{why}; starting again in {fact['pause_seconds']:.1f} s"
            )
        case _:
            return str(fact["event"])


def _death(exit_code: int | None) -> str:
    """None: of one that could not even be spawned, as on a machine without memory."""
    if exit_code is None:
        return "did not start"
    if exit_code < 0:
        return f"was ended by {signal.Signals(-exit_code).name}"
    return f"died with exit code {exit_code}"


def _phase(row: _Row) -> Text:
    style = {"ready": "green", "failed": "red"}.get(row.phase, "yellow")
    return Text(row.phase, style=style)


def _bar(row: _Row) -> ProgressBar | Text:
    if not row.total:
        return Text("")
    return ProgressBar(total=row.total, completed=row.done or 0, width=BAR_WIDTH)


def _clock(row: _Row) -> Text:
    seconds = row.seconds if row.seconds is not None else time.monotonic() - row.began
    return Text(f"{seconds:.1f} s", style="dim")
