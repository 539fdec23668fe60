"""Sequences that wait, by priority, then arrival."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from engine.sequence import Sequence

_MIN_STALE = 64


def order_key(sequence: Sequence) -> tuple[int, int]:
    """Smaller runs earlier. `arrival` is unique within a scheduler, so this is a total order."""
    return sequence.request.priority, sequence.arrival


class WaitingQueue:
    """push, pop, remove in O(log n). Iteration is in no order."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], Sequence]] = []
        self._members: dict[Sequence, None] = {}

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._members

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._members)

    def push(self, sequence: Sequence) -> None:
        heapq.heappush(self._heap, (order_key(sequence), sequence))
        self._members[sequence] = None

    def peek(self) -> Sequence | None:
        """The next to run, left in place."""
        while self._heap:
            sequence = self._heap[0][1]
            if sequence in self._members:
                return sequence
            heapq.heappop(self._heap)  # removed earlier
        return None

    def remove(self, sequence: Sequence) -> None:
        """Take out any member. Its heap entry goes when it is reached, or with many others."""
        del self._members[sequence]
        if len(self._heap) > 2 * len(self._members) + _MIN_STALE:
            self._heap = [(order_key(member), member) for member in self._members]
            heapq.heapify(self._heap)
