"""One supervised process of `baton serve`.

Life of a child
    STARTING  spawned; its start-up facts arrive as JSON lines on a pipe
    READY     it said so
    STOPPING  asked to drain by SIGTERM
    ENDED     gone, with its exit code; all it said has been read

What it says is never trusted to be well formed: a line that is no start-up fact is skipped, and
an endless line is passed on in pieces (`child_pipe.py`). While STARTING, its last words (`baton
COMMAND: why`) are kept as its `failure` for the supervisor to say, once.

A child gets its own process session, so a Ctrl-C in the terminal reaches only the
supervisor; and a parent-death signal, so no child outlives a supervisor that is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import logging
import os
import signal
import sys
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

from baton.child_pipe import ChildPipe
from cluster.startup import PROGRESS_FD_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

logger = logging.getLogger(__name__)
PR_SET_PDEATHSIG = 1
Facts = dict[str, Any]
NUMBER = (int, float)
# What each event must carry to be shown.
FACT_FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "begin": {"phase": str, "total": (int, type(None))},
    "advance": {"phase": str, "done": int, "total": (int, type(None))},
    "end": {"phase": str, "seconds": NUMBER},
    "ready": {"seconds": NUMBER},
    "failed": {"message": str},
}


class ChildState(Enum):
    STARTING = auto()
    READY = auto()
    STOPPING = auto()
    ENDED = auto()


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """What to run. `arguments` follow `program`; `environment` is added to ours."""

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    program: Sequence[str] = (sys.executable, "-m", "baton")


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
        self._pipes: list[ChildPipe] = []
        self._readers: set[asyncio.Task[None]] = set()
        self._waiter: asyncio.Task[None] | None = None

    @property
    def exit_code(self) -> int | None:
        return self._process.returncode if self._process else None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Spawn it. One that cannot be spawned has ENDED at once, with the reason."""
        ends: list[int] = []
        try:
            ends += [*os.pipe(), *os.pipe()]
            facts, facts_end, lines, lines_end = ends
            process = await self._spawn(facts_end, lines_end)
        except OSError as error:
            for descriptor in ends:
                os.close(descriptor)
            self.failure = f"it cannot be started: {error.strerror}"
            self._end()
            return
        os.close(facts_end)
        os.close(lines_end)
        self._process = process
        for descriptor, take in ((facts, self._take_fact), (lines, self._take_line)):
            pipe = await ChildPipe.open(descriptor)
            self._pipes.append(pipe)
            self._readers.add(asyncio.create_task(self._read(pipe, take)))
        self._waiter = asyncio.create_task(self._wait(process))

    async def _spawn(self, facts_end: int, lines_end: int) -> asyncio.subprocess.Process:
        """Its output goes to pipes of ours: asyncio would not see it end before those of its
        own are closed, which a grandchild can put off for ever."""
        environment = {**os.environ, **self.spec.environment, PROGRESS_FD_VARIABLE: str(facts_end)}
        return await asyncio.create_subprocess_exec(
            *self.spec.program,
            *self.spec.arguments,
            env=environment,
            pass_fds=(facts_end,),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=lines_end,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )

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

    async def _read(self, pipe: ChildPipe, take: Callable[[bytes], None]) -> None:
        try:
            async for line in pipe.lines():
                take(line)
        finally:
            pipe.close()

    def _take_fact(self, line: bytes) -> None:
        fact = parse_fact(line)
        if fact is None:
            logger.debug("%s sent no start-up fact: %.80r", self.spec.name, line)
            return
        if fact["event"] == "ready" and self.state is ChildState.STARTING:
            self.state = ChildState.READY
            self.ready_facts = fact
            self.ready.set()
        elif fact["event"] == "failed":
            self.failure = fact["message"]
        self._on_fact(self, fact)

    def _take_line(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip()
        command = self.spec.arguments[0] if self.spec.arguments else ""
        words = text.removeprefix(f"baton {command}: ")
        if self.state is ChildState.STARTING and words != text:
            self.failure = self.failure or words
        else:
            self._on_line(self, text)

    async def _wait(self, process: asyncio.subprocess.Process) -> None:
        await process.wait()
        for pipe in self._pipes:
            pipe.child_has_ended()
        await asyncio.wait(self._readers)
        self._end()

    def _end(self) -> None:
        self.state = ChildState.ENDED
        self.ended.set()


def parse_fact(line: bytes) -> Facts | None:
    """The start-up fact of a line, or None when it is none that we know."""
    try:
        fact = json.loads(line)
    except ValueError:
        return None
    fields = FACT_FIELDS.get(str(fact.get("event"))) if isinstance(fact, dict) else None
    if fields is None:
        return None
    is_complete = all(isinstance(fact.get(name), kind) for name, kind in fields.items())
    return fact if is_complete else None


def die_with_parent() -> None:
    """In the child, before exec: end when the supervisor ends, however that happens (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
