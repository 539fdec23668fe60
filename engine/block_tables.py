"""Block tables of prompts in chunks as rows of one array; decoding sequences: `decode_rows.py`.

A sequence's table is a Python list that grows by a block every `block_size` tokens. Turning it
into an array at each step would cost time per block; a row is kept instead, and only what is
new is written. Rows of sequences that were not in a step for longest are used again.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from numpy.typing import NDArray

    from engine.sequence import Sequence


class _Row:
    """`table` is the list the row was filled from. The block manager only ever appends to a
    table or replaces it by another list, so the same list means the same first blocks."""

    __slots__ = ("index", "num_filled", "table")

    def __init__(self, index: int) -> None:
        self.index = index
        self.table: list[int] = []
        self.num_filled = 0


class BlockTableRows:
    """Rows of at most `num_rows` sequences, each of at most `max_blocks` blocks."""

    def __init__(self, num_rows: int, max_blocks: int) -> None:
        self._array = np.zeros((num_rows, max_blocks), dtype=np.int32)
        self._rows: OrderedDict[str, _Row] = OrderedDict()

    def gather(self, sequences: SequenceOf[Sequence], width: int) -> NDArray[np.int32]:
        """int32 `[len(sequences), width]`: each sequence's leading block ids, in order.

        Columns beyond a sequence's blocks hold ids of some blocks that exist.
        """
        indices = [self._row_index(sequence) for sequence in sequences]
        return self._array[indices, :width]

    def _row_index(self, sequence: Sequence) -> int:
        table = sequence.block_table
        sequence_id = sequence.request.sequence_id
        row = self._rows.get(sequence_id)
        if row is None:
            row = self._rows[sequence_id] = self._unused_row()
        else:
            self._rows.move_to_end(sequence_id)
        if row.table is not table:
            row.table = table
            row.num_filled = 0
        if row.num_filled < len(table):
            self._array[row.index, row.num_filled : len(table)] = table[row.num_filled :]
            row.num_filled = len(table)
        return row.index

    def _unused_row(self) -> _Row:
        if len(self._rows) < self._array.shape[0]:
            return _Row(len(self._rows))
        return self._rows.popitem(last=False)[1]
