"""When frames pass which point of a hand-off: for finding where microseconds go.

Off, and then one look at a flag a point, until a benchmark calls `TRACE.start`. A frame is known
by the first layer and first position it holds; both ends name it alike. All processes of a machine
share the clock. One event loop marks; nothing here is locked.
"""

from __future__ import annotations

import time
from typing import NamedTuple


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
