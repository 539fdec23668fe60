"""All of one choice, kept until the whole answer is written.

A log-probability is kept in eight bytes, its id and its value as nodes send it: as an object it
takes fourteen times that, and an answer may have millions.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from cluster.request import TokenLogprobs
from gateway.choice import Piece

if TYPE_CHECKING:
    from gateway.tools.formats import ToolCall


class HeldAnswer:
    """Pieces of a choice, put together."""

    __slots__ = (
        "_calls",
        "_chosen",
        "_ends",
        "_texts",
        "_thoughts",
        "_top",
        "_top_ids",
        "token_ids",
    )

    def __init__(self) -> None:
        self.token_ids = array("I")
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._calls: tuple[ToolCall, ...] = ()
        self._chosen = array("f")
        self._top_ids = array("I")
        self._top = array("f")
        self._ends = array("Q")  # of each token, where its most likely ones end

    def add(self, piece: Piece) -> None:
        self._texts.append(piece.text)
        self._thoughts.append(piece.thought)
        self._calls += piece.calls
        self.token_ids.extend(piece.token_ids)
        for entry in piece.logprobs:
            self._chosen.append(entry.logprob)
            if entry.top:
                ids, values = zip(*entry.top, strict=True)
                self._top_ids.extend(ids)
                self._top.extend(values)
            self._ends.append(len(self._top))

    def piece(self) -> Piece:
        """All but log-probabilities."""
        return Piece(
            text="".join(self._texts),
            token_ids=self.token_ids.tolist(),
            calls=self._calls,
            thought="".join(self._thoughts),
        )

    def logprobs(self, start: int, end: int) -> list[TokenLogprobs]:
        """Of the tokens between these positions."""
        found = []
        begin = self._ends[start - 1] if start else 0
        for position in range(start, min(end, len(self._chosen))):
            stop = self._ends[position]
            top = tuple(zip(self._top_ids[begin:stop], self._top[begin:stop], strict=True))
            found.append(TokenLogprobs(self._chosen[position], top))
            begin = stop
        return found
