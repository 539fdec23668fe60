"""What other threads ask of the engine's thread.

Life of a command
    1. `call` queues it, from any thread. After `end` it is cancelled at once.
    2. The engine's thread takes it between two steps, or waits for it while it has none to run.
    3. Its future gets what it gives. `end` cancels those that are left: nobody waits in vain.

A rehearsal is no command: the thread plays it where it waits for one, with no step in flight, and
forgets it where it has work to do. An idle thread that plays one still counts as idle.
"""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from cluster.isolation import tried

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Command:
    """To be run between two steps."""

    run: Callable[[], object]
    future: Future[object] = field(default_factory=Future)

    def execute(self) -> None:
        """Unless it was cancelled. An error is the caller's, not the thread's."""
        if not self.future.set_running_or_notify_cancel():
            return
        outcome = tried(self.run)
        if isinstance(outcome, Exception):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)


class Commands:
    """In the order in which they were given; None: the thread is to stop."""

    def __init__(self, rehearse: Callable[[], None]) -> None:
        self._queue: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._rehearsal = Command(rehearse)
        self._is_rehearsal_queued = False
        self._has_ended = False
        self._ending = threading.Lock()  # between the last command queued and the last cancelled

    # ---- any thread ---------------------------------------------------------------------

    def call(self, run: Callable[[], T]) -> Future[T]:
        command = Command(run)
        with self._ending:
            if self._has_ended:
                command.future.cancel()
            else:
                self._queue.put(command)
        return command.future  # type: ignore[return-value]

    def stop(self) -> None:
        self._queue.put(None)

    def rehearse(self) -> None:
        """Soon, and once however often it is asked for meanwhile."""
        if not self._is_rehearsal_queued:
            self._is_rehearsal_queued = True
            self._queue.put(self._rehearsal)

    # ---- the engine's thread ------------------------------------------------------------

    def take(self) -> Command | None:
        """Raises `queue.Empty` when there is none now."""
        while (command := self._queue.get_nowait()) is self._rehearsal:
            self._is_rehearsal_queued = False
        return command

    def wait(self, seconds: float | None = None) -> Command | None:
        """Raises `queue.Empty` when none came for so long."""
        while (command := self._queue.get(timeout=seconds)) is self._rehearsal:
            self._is_rehearsal_queued = False
            self._rehearsal.run()
        return command

    def end(self) -> None:
        """Idempotent; by any thread once the engine's takes none any more."""
        with self._ending:
            self._has_ended = True
        while True:
            try:
                command = self._queue.get_nowait()
            except queue.Empty:
                return
            if command is not None:
                command.future.cancel()
