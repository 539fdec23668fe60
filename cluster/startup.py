"""Start-up as people and supervisors see it: named phases, each timed, then "ready".

Life of a report
    1. A process creates one `StartupReport` and enters its phases one after the other.
    2. Each phase is told to the sink when it begins, as it advances and when it ends.
    3. `ready` closes the report and says how long all of it took.

Two sinks exist: log lines for a person who started the one program, and JSON lines on an
inherited pipe for `baton serve`, which draws one row per process.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from cluster.errors import ConfigError

logger = logging.getLogger(__name__)
PROGRESS_FD_VARIABLE = "BATON_PROGRESS_FD"
ADVANCE_INTERVAL_SECONDS = 0.1

Fact = str | int | float | None
Sink = Callable[[Mapping[str, Fact]], None]


class Phase:
    """One running phase. `advance` adds to the work done, in the unit of `total`."""

    def __init__(self, name: str, total: int | None, sink: Sink) -> None:
        self.name = name
        self._total = total
        self._done = 0
        self._sink = sink
        self._told_at = 0.0
        self.is_given_up = False  # set by who stops it halfway: its end is not told then

    def advance(self, amount: int) -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._told_at >= ADVANCE_INTERVAL_SECONDS or self._done == self._total:
            self._told_at = now
            self._sink(
                {"event": "advance", "phase": self.name, "done": self._done, "total": self._total}
            )


class StartupReport:
    def __init__(self, sink: Sink | None = None, clock: Callable[[], float] = time.monotonic):
        self._sink = sink or sink_from_environment()
        self._clock = clock
        self._began = clock()
        self.phase_seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str, *, total: int | None = None) -> Iterator[Phase]:
        began = self._clock()
        self._sink({"event": "begin", "phase": name, "total": total})
        phase = Phase(name, total, self._sink)
        yield phase
        if phase.is_given_up:
            return
        seconds = self._clock() - began
        self.phase_seconds[name] = seconds
        self._sink({"event": "end", "phase": name, "seconds": round(seconds, 3)})

    def ready(self, **facts: Fact) -> None:
        seconds = self._clock() - self._began
        self._sink({"event": "ready", "seconds": round(seconds, 3), **facts})
        tell_systemd()

    def failed(self, message: str) -> None:
        self._sink({"event": "failed", "message": message})


def tell_systemd(environ: Mapping[str, str] = os.environ) -> None:
    """That this process is ready, where a unit of Type=notify waits to hear it."""
    address = environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifying:
        try:
            notifying.sendto(b"READY=1", address.replace("@", "\0", 1))
        except OSError as error:
            logger.warning("systemd cannot be told that this is ready: %s", error.strerror)


def sink_from_environment(environ: Mapping[str, str] = os.environ) -> Sink:
    """JSON lines on the pipe a supervisor names, else log lines."""
    text = environ.get(PROGRESS_FD_VARIABLE)
    if text is None:
        return log_sink
    try:
        return pipe_sink(int(text))
    except (ValueError, OSError) as error:
        raise ConfigError(f"{PROGRESS_FD_VARIABLE} is not an open file descriptor.") from error


def log_sink(fact: Mapping[str, Fact]) -> None:
    if fact["event"] == "end":
        logger.info("%s took %.2f s", fact["phase"], fact["seconds"])
    elif fact["event"] == "ready":
        words = [f"{key} {fact[key]}" for key in fact if key not in ("event", "seconds")]
        logger.info("ready in %.2f s: %s", fact["seconds"], ", ".join(words))


def pipe_sink(file_descriptor: int) -> Sink:
    """Writes each fact as one JSON line; a reader that has gone is no reason to stop. Raises
    `OSError` for a descriptor that is not open; it stays open as long as the process."""
    os.fstat(file_descriptor)

    def write(fact: Mapping[str, Fact]) -> None:
        try:
            os.write(file_descriptor, json.dumps(fact).encode() + b"\n")
        except OSError:
            logger.debug("nobody reads the start-up report any more")

    return write
