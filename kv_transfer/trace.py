"""When frames pass which point of a hand-off: for finding where microseconds go.

Off, and then one look at a flag a point, until a benchmark calls `TRACE.start`, or starts a node
with BATON_KV_TRACE: the node writes its marks into that folder when it ends, and keeps all of them
until then. A frame is known by the first layer and first position it holds; both ends name it so.
All processes of a machine share the clock. The event loop marks, and of a node the engine's thread:
a mark is one append, nothing here is locked.
"""

from __future__ import annotations

import atexit
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

VARIABLE = "BATON_KV_TRACE"


class Mark(NamedTuple):
    """`seconds` are those of `time.perf_counter`."""

    point: str
    layer: int
    position: int
    seconds: float


class FrameTrace:
    __slots__ = ("_marks", "is_on")

    def __init__(self) -> None:
        self.is_on = False
        self._marks: list[Mark] = []

    def start(self) -> None:
        """Forget what was, and note what follows."""
        self._marks = []
        self.is_on = True

    def stop(self) -> list[Mark]:
        """What was noted since `start`."""
        self.is_on = False
        marks, self._marks = self._marks, []
        return marks

    def mark(self, point: str, layer: int = 0, position: int = 0) -> None:
        """Ask `is_on` first: then a point costs nothing while nobody looks."""
        self._marks.append(Mark(point, layer, position, time.perf_counter()))


TRACE = FrameTrace()


def trace_for(env: Mapping[str, str]) -> None:
    """Mark, if BATON_KV_TRACE says so, from now to the end of this process."""
    folder = env.get(VARIABLE)
    if folder:
        TRACE.start()
        atexit.register(lambda: write_marks(TRACE.stop(), Path(folder) / f"{os.getpid()}.marks"))


def write_marks(marks: list[Mark], path: Path) -> None:
    path.write_text("".join(f"{m.point} {m.layer} {m.position} {m.seconds!r}\n" for m in marks))


def read_marks(path: Path) -> list[Mark]:
    lines = (line.split() for line in path.read_text().splitlines())
    return [Mark(point, int(layer), int(at), float(seconds)) for point, layer, at, seconds in lines]
