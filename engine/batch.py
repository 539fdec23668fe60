"""From chunks of prompts to the input tensors of one forward pass; decode steps have their own
way, see `row_inputs.py`.

Life of a step's inputs
    1. `InputBuffer` owns host memory and its twin on the device. A step's arrays are carved
       from it in a fixed order, so on a GPU all of them travel in one copy.
    2. `BatchBuilder.build_prefill` fills the host arrays with numpy: work per sequence is a few
       list reads, work per token is vectorised.
    3. `Batch` names the arrays on the device. They are valid until the next one is built.

Sizes in comments: T tokens, N rows (sequences, then padding), W columns of block tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from engine.block_tables import BlockTableRows
from engine.input_buffer import BatchShape, InputBuffer
from engine.tensor_parallel.wire import StepHeader

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as SequenceOf

    import torch
    from numpy.typing import NDArray

    from engine.schedule import ScheduledChunk
    from engine.tensor_parallel.wire import Announce

# Block tables are this many columns wide, or a multiple: a kernel is compiled anew for a row
# stride that is no multiple of 16, which would happen in the middle of serving.
_TABLE_GRAIN = 16


class Samples(NamedTuple):
    """The tokens of a pass that are sampled, each the last of its row; int64 `[num_samples]`."""

    indices: torch.Tensor
    rows: torch.Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs of one pass, on the device.

    `is_decode`: row i is token i. `samples` None: all tokens are sampled. Padding rows (decode
    only) have seq_len 0 and slot -1.
    """

    token_ids: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [T]
    slot_mapping: torch.Tensor  # int64 [T], block_id * block_size + offset
    samples: Samples | None
    seq_lens: torch.Tensor  # int32 [N], with this step's tokens
    cu_seqlens_q: torch.Tensor  # int32 [N + 1], first token of each row; prefill only
    block_tables: torch.Tensor  # int32 [N, W]
    num_samples: int
    max_seqlen_q: int
    is_decode: bool


def table_width(num_blocks: int) -> int:
    """Columns of block tables whose longest sequence has `num_blocks`."""
    return -(-num_blocks // _TABLE_GRAIN) * _TABLE_GRAIN


class BatchBuilder:
    """Turns chunks into batches for one model on one device."""

    def __init__(
        self,
        *,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        device: torch.device,
        announce: Announce | None = None,
    ) -> None:
        """`announce` hears of each batch before it is uploaded: other ranks run it too."""
        self._announce = announce
        max_blocks = table_width(-(-max_model_len // block_size))
        self._block_size = block_size
        # Twice the rows: a sequence that skips a few steps keeps its row.
        self._tables = BlockTableRows(2 * max_num_seqs, max_blocks)
        self._buffer = InputBuffer(
            BatchShape(
                num_tokens=max(max_num_batched_tokens, max_num_seqs),
                num_rows=max_num_seqs,
                num_samples=max_num_seqs,
                table_width=max_blocks,
            ),
            device,
        )

    def build_prefill(self, chunks: SequenceOf[ScheduledChunk]) -> Batch:
        """Chunks of any length, one after the other."""
        sequences = [chunk.sequence for chunk in chunks]
        lengths = np.array([chunk.num_scheduled_tokens for chunk in chunks], dtype=np.int64)
        computed = np.array([chunk.begin for chunk in chunks], dtype=np.int64)
        ends = np.cumsum(lengths)
        seq_lens = computed + lengths
        sampled = [index for index, chunk in enumerate(chunks) if chunk.samples]
        width = table_width((int(seq_lens.max()) - 1) // self._block_size + 1)
        tables = self._tables.gather(sequences, width)
        num_tokens = int(ends[-1])
        arrays = self._buffer.arrays(BatchShape(num_tokens, len(chunks), len(sampled), width))
        rows = np.repeat(np.arange(len(chunks)), lengths)
        np.add(np.arange(num_tokens), (seq_lens - ends)[rows], out=arrays.positions)
        arrays.slot_mapping[:] = self._slots(tables, rows, arrays.positions)
        _fill_token_ids(arrays.token_ids, chunks)
        arrays.sample_indices[:] = ends[sampled] - 1
        arrays.sample_rows[:] = sampled
        arrays.seq_lens[:] = seq_lens
        arrays.cu_seqlens_q[0] = 0
        arrays.cu_seqlens_q[1:] = ends
        arrays.block_tables[:] = tables
        longest = int(lengths.max())
        return self._send(StepHeader(False, num_tokens, len(chunks), len(sampled), width, longest))

    def receive(self, header: StepHeader, fill: Callable[[memoryview], None]) -> Batch:
        """The chunks that another rank announced. `fill` writes their packed arrays."""
        self._buffer.arrays(
            BatchShape(header.num_tokens, header.num_rows, header.num_samples, header.table_width)
        )
        fill(self._buffer.filled)
        return self._send(header)

    def _send(self, header: StepHeader) -> Batch:
        if self._announce is not None:
            self._announce(header, self._buffer.filled)
        return _batch(
            self._buffer.upload(),
            num_samples=header.num_samples,
            max_seqlen_q=header.max_seqlen_q,
        )

    def _slots(
        self,
        tables: NDArray[np.int32],
        rows: NDArray[np.int64],
        positions: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        blocks = tables[rows, positions // self._block_size].astype(np.int64)
        slots: NDArray[np.int64] = blocks * self._block_size + positions % self._block_size
        return slots


def _batch(tensors: SequenceOf[torch.Tensor], *, num_samples: int, max_seqlen_q: int) -> Batch:
    token_ids, positions, slot_mapping, *samples, seq_lens, cu_seqlens_q, tables = tensors
    return Batch(
        token_ids=token_ids,
        positions=positions,
        slot_mapping=slot_mapping,
        samples=Samples(*samples),
        seq_lens=seq_lens,
        cu_seqlens_q=cu_seqlens_q,
        block_tables=tables,
        num_samples=num_samples,
        max_seqlen_q=max_seqlen_q,
        is_decode=False,
    )


def _fill_token_ids(out: NDArray[np.int64], chunks: SequenceOf[ScheduledChunk]) -> None:
    begin = 0
    for chunk in chunks:
        first = chunk.begin
        end = begin + chunk.num_scheduled_tokens
        out[begin:end] = chunk.sequence.token_ids[first : first + chunk.num_scheduled_tokens]
        begin = end
