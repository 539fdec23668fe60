"""Short ends of prompts as rows of a decode step.

Of a prompt whose beginning is cached little is left to compute: less than it takes the host to
launch the kernels of a pass one by one. A decode step is a captured graph, one launch. So each
token of such chunks becomes a row, as if it were the last one of a sequence that ends there. In
every layer all rows store their KV before any of them attends: each finds that of those before it.

The rows whose successors are drawn come first; the others draw, too, and nobody looks at it.
Attention to prompts reads the KV before a chunk once for many tokens, a row reads it for itself.
That limits how long a prefix the rows may have, all together.

Pure: no tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from engine.decode_rows import TableChange

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from numpy.typing import NDArray

    from engine.schedule import ScheduledChunk
    from engine.sequence import Sequence

# 4 ms of an H200, at 9 TB/s: rows of one prompt meet in the cache of the GPU. 16 rows behind 8192
# tokens of an 8B model take 6.5 ms, 64 behind 512 take 5.3; kernels launched one by one take 10 to
# 12. 64 rows behind 8192 would take 13.
MAX_READ_BYTES = 32 << 30


class PromptRow(NamedTuple):
    """The token of `sequence` before `end`, and all before it."""

    sequence: Sequence
    end: int

    @property
    def token_id(self) -> int:
        return self.sequence.token_ids[self.end - 1]


def tables_of(rows: SequenceOf[PromptRow], block_size: int) -> list[TableChange]:
    """The block table of each row, as far as it reads. All rows of a prompt have parts of one."""
    tables: dict[Sequence, NDArray[np.int32]] = {}
    changes = []
    for number, (sequence, end) in enumerate(rows):
        if sequence not in tables:
            tables[sequence] = np.array(sequence.block_table, np.int32)
        changes.append(TableChange(number, 0, tables[sequence][: -(-end // block_size)]))
    return changes


def rows_of(
    chunks: SequenceOf[ScheduledChunk], *, max_rows: int, max_read_tokens: int
) -> list[PromptRow] | None:
    """A row for each token; None where the chunks are too many tokens for that, have too much
    before them, or do not all end with a token to draw."""
    if sum(chunk.num_scheduled_tokens for chunk in chunks) > max_rows:
        return None
    if not all(chunk.samples for chunk in chunks):
        return None
    ends = [chunk.begin + chunk.num_scheduled_tokens for chunk in chunks]
    rows = [PromptRow(chunk.sequence, end) for chunk, end in zip(chunks, ends, strict=True)]
    for chunk, last in zip(chunks, ends, strict=True):
        rows += [PromptRow(chunk.sequence, end) for end in range(chunk.begin + 1, last)]
    return rows if sum(row.end for row in rows) <= max_read_tokens else None
