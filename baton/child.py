"""One supervised process of `baton serve`.

Life of a child
    STARTING  spawned; its start-up facts arrive as JSON lines on a pipe
    READY     it said so
    STOPPING  asked to drain by SIGTERM
    ENDED     gone, with its exit code

A child gets its own process session, so a Ctrl-C in the terminal reaches only the
supervisor; and a parent-death signal, so no child outlives a supervisor that is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import sys
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

from cluster.startup import PROGRESS_FD_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

PR_SET_PDEATHSIG = 1
Facts = dict[str, Any]


class ChildState(Enum):
    STARTING = auto()
    READY = auto()
    STOPPING = auto()
    ENDED = auto()


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """What to run. `arguments` follow `python -m baton`; `environment` is added to ours."""

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


class Child:
    def __init__(
        self,
        spec: ChildSpec,
        *,
        on_fact: Callable[[Child, Facts], None],
        on_line: Callable[[Child, str], None],
    ) -> None:
        self.spec = spec
        self.state = ChildState.STARTING
        self.ready_facts: Facts = {}
        self.failure: str | None = None
        self.ready = asyncio.Event()
        self.ended = asyncio.Event()
        self._on_fact = on_fact
        self._on_line = on_line
        self._process: asyncio.subprocess.Process | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def exit_code(self) -> int | None:
        return self._process.returncode if self._process else None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def start(self) -> None:
        reader, writer = os.pipe()
        environment = {**os.environ, **self.spec.environment, PROGRESS_FD_VARIABLE: str(writer)}
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "baton",
                *self.spec.arguments,
                env=environment,
                pass_fds=(writer,),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        finally:
            os.close(writer)
        self._spawn(self._read_facts(reader))
        self._spawn(self._read_lines())
        self._spawn(self._wait())

    def terminate(self) -> None:
        """Ask it to drain and end."""
        if self.state is not ChildState.ENDED:
            self.state = ChildState.STOPPING
            self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _read_facts(self, descriptor: int) -> None:
        stream = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(descriptor, "rb", buffering=0)
        )
        while line := await stream.readline():
            self._take_fact(json.loads(line))
        transport.close()

    def _take_fact(self, fact: Facts) -> None:
        if fact["event"] == "ready" and self.state is ChildState.STARTING:
            self.state = ChildState.READY
            self.ready_facts = fact
            self.ready.set()
        elif fact["event"] == "failed":
            self.failure = str(fact["message"])
        self._on_fact(self, fact)

    async def _read_lines(self) -> None:
        process = self._process
        if process is None or process.stdout is None:
            return
        while line := await process.stdout.readline():
            self._on_line(self, line.decode(errors="replace").rstrip())

    async def _wait(self) -> None:
        if self._process is not None:
            await self._process.wait()
        self.state = ChildState.ENDED
        self.ended.set()


def die_with_parent() -> None:
    """In the child, before exec: end when the supervisor ends, however that happens (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
