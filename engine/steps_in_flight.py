"""Block tables that steps in flight may still write to: nobody gets their blocks before these
steps are collected."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from engine.prefix_cache import BlockAccountingError

if TYPE_CHECKING:
    from collections.abc import Iterator


class StepsInFlight:
    """Counts steps, which end in the order of their launch."""

    def __init__(self) -> None:
        self._num_launched = 0  # since the start
        self._num_collected = 0
        self._leaving: deque[tuple[int, list[int]]] = deque()  # steps to collect before, a table

    def launched(self) -> None:
        self._num_launched += 1

    def keeps(self, table: list[int]) -> bool:
        """Take the references of a freed sequence, if a step is in flight."""
        if self._num_launched == self._num_collected:
            return False
        self._leaving.append((self._num_launched, table))
        return True

    def collected(self) -> Iterator[list[int]]:
        """The oldest step has ended; the tables that no step works on any more."""
        if self._num_collected == self._num_launched:
            raise BlockAccountingError("No step is launched.")
        self._num_collected += 1
        while self._leaving and self._leaving[0][0] <= self._num_collected:
            yield self._leaving.popleft()[1]

    def tables(self) -> list[list[int]]:
        return [table for _, table in self._leaving]
