"""Keeps the processes of `baton serve` alive, and ends them all.

Life of a local cluster
    1. Redis, then the nodes and the gateway are started together; each reports its phases.
    2. All ready: the cluster is up. One that ends before that ends the start: its own words
       are shown and the supervisor stops with them.
    3. A node or gateway that dies later is started again under its name, after a pause that
       doubles with each death in a row; the others go on.
    4. Stop: the gateway first, so that streams finish while the nodes still run; then all nodes
       at once; then Redis. Who has not ended within the time given is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from baton.child import Child, ChildSpec, ChildState, Facts
from cluster.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FIRST_PAUSE_SECONDS = 0.5
MAX_PAUSE_SECONDS = 30.0
STABLE_SECONDS = 60.0


@dataclass(slots=True)
class Restart:
    """How often one process died lately; its next pause in seconds."""

    first_pause_seconds: float = FIRST_PAUSE_SECONDS
    num_in_a_row: int = 0

    def next_pause(self, lived_seconds: float) -> float:
        self.num_in_a_row = 1 if lived_seconds > STABLE_SECONDS else self.num_in_a_row + 1
        doublings = min(self.num_in_a_row - 1, 16)
        return min(MAX_PAUSE_SECONDS, self.first_pause_seconds * float(2**doublings))


class StartFailed(ConfigError):
    """A process ended before it was ready."""


class Supervisor:
    """Owns the children. The last of `specs` is stopped first, the others together."""

    def __init__(
        self,
        specs: Sequence[ChildSpec],
        *,
        on_fact: Callable[[Child, Facts], None],
        on_line: Callable[[Child, str], None],
        shutdown_timeout_seconds: float,
        first_pause_seconds: float = FIRST_PAUSE_SECONDS,
    ) -> None:
        self._specs = list(specs)
        self._on_fact = on_fact
        self._on_line = on_line
        self._shutdown_timeout_seconds = shutdown_timeout_seconds
        self._first_pause_seconds = first_pause_seconds
        self._children: dict[str, Child] = {}
        self._watchers: list[asyncio.Task[None]] = []
        self._spawning: set[asyncio.Task[None]] = set()
        self._stopping = False

    @property
    def children(self) -> list[Child]:
        return list(self._children.values())

    async def start(self) -> None:
        """Start all and return when all are ready. Raises `StartFailed`; call `stop` after."""
        for spec in self._specs:
            await self._start_one(spec)
        await asyncio.gather(*(self._until_ready(child) for child in self.children))
        self._watchers = [
            asyncio.create_task(self._watch(name), name=f"watch {name}") for name in self._children
        ]

    async def stop(self) -> None:
        """End every child, the last one before all others, within the shutdown timeout each.
        Idempotent."""
        self._stopping = True
        for watcher in self._watchers:
            watcher.cancel()
        if self._spawning:
            await asyncio.wait(self._spawning)
        for children in (self.children[-1:], self.children[:-1]):
            await asyncio.gather(*(self._stop_one(child) for child in children))

    def kill(self) -> None:
        self._stopping = True
        for child in self.children:
            child.kill()

    async def _start_one(self, spec: ChildSpec) -> None:
        """Not cut short by a cancel: a process nobody knows of could not be ended."""
        if self._stopping:
            return
        child = Child(spec, on_fact=self._on_fact, on_line=self._on_line)
        if (before := self._children.get(spec.name)) is not None:
            child.ready_facts = before.ready_facts  # until it says where it serves itself
        self._children[spec.name] = child
        spawning = asyncio.create_task(child.start())
        self._spawning.add(spawning)
        spawning.add_done_callback(self._spawning.discard)
        await asyncio.shield(spawning)

    async def _until_ready(self, child: Child) -> None:
        ready = asyncio.create_task(child.ready.wait())
        ended = asyncio.create_task(child.ended.wait())
        await asyncio.wait({ready, ended}, return_when=asyncio.FIRST_COMPLETED)
        for task in (ready, ended):
            task.cancel()
        if not child.ready.is_set():
            why = child.failure or f"it ended with exit code {child.exit_code}."
            raise StartFailed(f"{child.spec.name} did not start: {why}")

    async def _watch(self, name: str) -> None:
        restart = Restart(self._first_pause_seconds)
        while not self._stopping:
            child = self._children[name]
            began = time.monotonic()
            await child.ended.wait()
            if self._stopping:
                return
            pause = restart.next_pause(time.monotonic() - began)
            died = {"event": "died", "exit_code": child.exit_code, "pause_seconds": pause}
            self._on_fact(child, died | {"message": child.failure})
            await asyncio.sleep(pause)
            await self._start_one(child.spec)

    async def _stop_one(self, child: Child) -> None:
        if child.state is ChildState.ENDED:
            return
        child.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(child.ended.wait(), self._shutdown_timeout_seconds)
        if not child.ended.is_set():
            child.kill()
            await child.ended.wait()
