"""Stop strings in a stream of text whose pieces cut anywhere.

Life of a matcher (one per sequence)
    1. `push` takes a piece and gives the text that can be shown: all but the longest end that
       could still become a stop string.
    2. When a stop string is complete, `push` gives the text up to it (or through it, when
       asked), `matched` names it, and nothing more is taken.
    3. `flush` gives the held-back end when the text ends by itself.

The earliest occurrence wins, whatever the order in which the strings were given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class StopMatcher:
    """`stops` holds at least one string, none empty."""

    __slots__ = ("_held", "_include", "_stops", "matched")

    def __init__(self, stops: Sequence[str], *, include: bool) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, piece: str) -> str:
        text = self._held + piece
        found = self._earliest(text)
        if found is not None:
            start, self.matched = found
            self._held = ""
            return text[: start + len(self.matched)] if self._include else text[:start]
        keep = self._num_undecided(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held

    def _earliest(self, text: str) -> tuple[int, str] | None:
        best: tuple[int, str] | None = None
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (best is None or start < best[0]):
                best = (start, stop)
        return best

    def _num_undecided(self, text: str) -> int:
        """Length of the longest end of `text` that begins some stop string."""
        return max(_overlap(text, stop) for stop in self._stops)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without being all of it."""
    position = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while position >= 0:
        if stop.startswith(text[position:]):
            return len(text) - position
        position = text.find(stop[0], position + 1)
    return 0
