"""Kills, stops and continues processes of a running cluster, and sees that it did.

Each action is verified where the kernel tells (/proc): a killed process is gone, a stopped one
stands still, a continued one does not. An action that had no effect raises `NotInjected`: the row
would prove nothing. What was done is recorded in the history, too.
"""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tests.faults.history import NO_REQUEST

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from tests.faults.history import History

INJECTED_WITHIN_SECONDS = 10.0
LEAVES_WITHIN_SECONDS = 60.0  # what runs there ends first
POLL_SECONDS = 0.005


class NotInjected(AssertionError):
    """The fault did not take place: the row proves nothing."""


class Processes(Protocol):
    """A cluster whose programs have names."""

    def child(self, name: str) -> int: ...


def process_state(pid: int) -> str:
    """The letter of /proc/PID/stat (R, S, T, Z …), or "gone"."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "gone"
    return stat.rpartition(")")[2].split()[0]


def is_gone(pid: int) -> bool:
    """No thread of it is left: the first may have ended while others still hold its sockets."""
    state = process_state(pid)
    if state != "Z":
        return state == "gone"
    try:
        return len(list(Path(f"/proc/{pid}/task").iterdir())) <= 1
    except OSError:
        return True


def verify(
    condition: Callable[[], bool], what: str, *, seconds: float = INJECTED_WITHIN_SECONDS
) -> None:
    """Raises `NotInjected` when `condition` does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise NotInjected(what)
        time.sleep(POLL_SECONDS)


@dataclass
class Nemesis:
    """`log`: what was done to whom, in order. `heal` continues whatever is still stopped."""

    cluster: Processes
    history: History | None = None
    log: list[tuple[str, str, int]] = field(default_factory=list)
    stopped: set[int] = field(default_factory=set)

    def kill(self, name: str) -> int:
        pid = self.cluster.child(name)
        os.kill(pid, signal.SIGKILL)
        verify(lambda: is_gone(pid), f"{name} survived its kill")
        return self._note("kill", name, pid)

    def end(self, name: str) -> int:
        """In order: it drains, and leaves."""
        pid = self.cluster.child(name)
        os.kill(pid, signal.SIGTERM)
        verify(lambda: is_gone(pid), f"{name} did not leave", seconds=LEAVES_WITHIN_SECONDS)
        return self._note("end", name, pid)

    def kill_in_drain(self, name: str, is_known: Callable[[], bool]) -> int:
        """It is told to end, and killed when that it drains `is_known`, long before it is done."""
        pid = self.cluster.child(name)
        os.kill(pid, signal.SIGTERM)
        verify(is_known, f"nobody knows that {name} drains")
        os.kill(pid, signal.SIGKILL)
        verify(lambda: is_gone(pid), f"{name} survived its kill")
        return self._note("kill in its drain", name, pid)

    def stop(self, name: str) -> int:
        pid = self.cluster.child(name)
        self.stopped.add(pid)
        os.kill(pid, signal.SIGSTOP)
        verify(lambda: process_state(pid) == "T", f"{name} was not stopped")
        return self._note("stop", name, pid)

    def resume(self, pid: int) -> None:
        """Continue a process that stands still."""
        if process_state(pid) != "T":
            raise NotInjected(f"{pid} did not stand still until it was continued")
        os.kill(pid, signal.SIGCONT)
        verify(lambda: process_state(pid) != "T", f"{pid} was not continued")
        self.stopped.discard(pid)
        self._note("continue", "", pid)

    def who_stopped(self, names: Sequence[str]) -> str:
        """The one of these programs that has stopped itself at a failpoint."""
        found: list[tuple[str, int]] = []

        def look() -> bool:
            pids = [(name, self.cluster.child(name)) for name in names]
            found[:] = [(name, pid) for name, pid in pids if process_state(pid) == "T"]
            return bool(found)

        verify(look, "no node has stopped")
        self.stopped.update(pid for _, pid in found)
        name, pid = found[0]
        self._note("stopped at a failpoint", name, pid)
        return name

    def gone(self, pids: Iterable[int]) -> list[int]:
        """Those that are not there any more."""
        gone = [pid for pid in pids if is_gone(pid)]
        for pid in gone:
            self._note("gone", "", pid)
        return gone

    def note(self, what: str) -> None:
        """Something else was done, by a proxy or an order."""
        self._note(what, "", 0)

    def heal(self) -> None:
        for pid in list(self.stopped):
            self.stopped.discard(pid)
            if process_state(pid) == "T":
                os.kill(pid, signal.SIGCONT)

    def _note(self, what: str, name: str, pid: int) -> int:
        self.log.append((what, name, pid))
        if self.history is not None:
            self.history.record(NO_REQUEST, "fault", detail=f"{what} {name} {pid or ''}".strip())
        return pid


@dataclass(frozen=True, slots=True)
class Planned:
    """One fault of a schedule: after `pause_seconds`, do `what` to `name`."""

    pause_seconds: float
    what: str
    name: str
    lasts_seconds: float


def draw_schedule(
    seed: int, count: int, faults: Sequence[tuple[str, str]], *, pause: tuple[float, float]
) -> list[Planned]:
    """Random faults of these (what, name), the same for the same seed. What lasts, a stall or a
    bad link, lasts for 1 to 8 seconds."""
    draw = random.Random(seed)
    return [
        Planned(draw.uniform(*pause), *draw.choice(faults), draw.uniform(1.0, 8.0))
        for _ in range(count)
    ]
