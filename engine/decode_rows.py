"""Which row of the batch each decoding sequence has, and what changed in their block tables.

Life of a row
    1. A sequence that decodes first gets a row that nobody has, and its whole block table is
       written there.
    2. It keeps the row as long as it is in every step. When its table grows, only the new entry
       is written.
    3. Sequences that are not in a step lose their rows; those that come, and the last ones, get
       them, so the n sequences of a step have the rows 0 to n - 1.

The tables themselves are on the device, where the changes of a step are written in the order of
the steps: one that still runs never sees those of the next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from numpy.typing import NDArray

    from engine.sequence import Sequence


class TableChange(NamedTuple):
    """Row `row` has these block ids from `column` on."""

    row: int
    column: int
    block_ids: list[int] | NDArray[np.int32]


class DecodeRows:
    """Rows of at most `num_rows` sequences; `sequences[i]` has row i."""

    def __init__(self, num_rows: int) -> None:
        self.sequences: list[Sequence] = []
        self._asked: list[Sequence] = []  # the same in the order in which they were given last
        self._filled_from: list[list[int]] = [[] for _ in range(num_rows)]
        self._num_filled = np.zeros(num_rows, dtype=np.int64)

    def overwritten(self, num_rows: int) -> None:
        """The tables of so many first rows are somebody else's now."""
        self._filled_from[:num_rows] = [[] for _ in range(num_rows)]
        self._num_filled[:num_rows] = 0

    def arrange(self, sequences: SequenceOf[Sequence]) -> bool:
        """Give each of these a row, and nobody else. False, and the same list, if just these were
        asked for last time. Who decides keeps an order of its own, so that is what is compared."""
        if self._asked == sequences:
            return False
        self._asked = list(sequences)
        wanted = dict.fromkeys(sequences)
        rows: list[Sequence | None] = [None] * len(sequences)
        for row, sequence in enumerate(self.sequences[: len(sequences)]):
            if sequence in wanted:
                rows[row] = sequence
                del wanted[sequence]
        newcomers = iter(wanted)
        self.sequences = [next(newcomers) if each is None else each for each in rows]
        return True

    def all_changes(self) -> list[TableChange]:
        """What is not written yet of any row's table."""
        changes: list[TableChange] = []
        for row, sequence in enumerate(self.sequences):
            table = sequence.block_table
            if self._filled_from[row] is not table:
                self._filled_from[row] = table
                self._num_filled[row] = 0
            self._see(row, table, changes)
        return changes

    def growth(self, columns: NDArray[np.int64]) -> list[TableChange]:
        """The same when each row has the sequence and the table it had, and this step needs the
        table up to `columns[row]`."""
        changes: list[TableChange] = []
        for row in np.flatnonzero(columns >= self._num_filled[: len(columns)]).tolist():
            self._see(row, self.sequences[row].block_table, changes)
        return changes

    def _see(self, row: int, table: list[int], changes: list[TableChange]) -> None:
        """The block manager only ever appends to a table or replaces it by another list."""
        num_filled = int(self._num_filled[row])
        if num_filled < len(table):
            changes.append(TableChange(row, num_filled, table[num_filled:]))
            self._num_filled[row] = len(table)
