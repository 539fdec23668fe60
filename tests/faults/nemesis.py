"""Kills, stops and continues processes of a running cluster, and sees that it did."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tests.e2e.cluster_process import children_of, command_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tests.e2e.cluster_process import ClusterProcess

INJECTED_WITHIN_SECONDS = 5.0


class NotInjected(AssertionError):
    """The fault did not take place: the row proves nothing."""


def process_state(pid: int) -> str:
    """The letter of /proc/PID/stat (R, S, T, Z …), or "gone"."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "gone"
    return stat.rpartition(")")[2].split()[0]


def is_gone(pid: int) -> bool:
    return process_state(pid) in ("gone", "Z")


def verify(condition: Callable[[], bool], what: str) -> None:
    """Raises `NotInjected` when `condition` does not come true within five seconds."""
    deadline = time.monotonic() + INJECTED_WITHIN_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise NotInjected(what)
        time.sleep(0.01)


@dataclass
class Nemesis:
    """`log`: what was done to whom, in order. `heal` continues whatever is still stopped."""

    cluster: ClusterProcess
    log: list[tuple[str, str, int]] = field(default_factory=list)
    stopped: set[int] = field(default_factory=set)

    def kill(self, name: str) -> int:
        pid = self.cluster.child(name)
        os.kill(pid, signal.SIGKILL)
        verify(lambda: is_gone(pid), f"{name} survived its kill")
        return self._note("kill", name, pid)

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

    def who_stopped(self) -> int:
        """The node that has stopped itself at a failpoint."""
        found: list[int] = []

        def look() -> bool:
            found[:] = [pid for pid in self._nodes() if process_state(pid) == "T"]
            return bool(found)

        verify(look, "no node has stopped")
        self.stopped.update(found)
        return self._note("stopped at a failpoint", "", found[0])

    def gone(self, pids: Iterable[int]) -> list[int]:
        """Those that are not there any more."""
        gone = [pid for pid in pids if is_gone(pid)]
        self.log.extend(("gone", "", pid) for pid in gone)
        return gone

    def heal(self) -> None:
        for pid in list(self.stopped):
            self.stopped.discard(pid)
            if process_state(pid) == "T":
                os.kill(pid, signal.SIGCONT)

    def _nodes(self) -> list[int]:
        roles = {"prefill", "decode"}
        return [pid for pid in children_of(self.cluster.pid) if roles & set(command_line(pid))]

    def _note(self, what: str, name: str, pid: int) -> int:
        self.log.append((what, name, pid))
        return pid
