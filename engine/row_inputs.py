"""What the host says of each row of a step, in one copy to the device.

    memory = the arrays of `HostRows`, each of `max_rows`; then, for changed entries of the block
             tables, their places; then as many block ids

Host memory is filled for one step while the copies of two earlier ones may still be queued, so
there are three of them. On the device there is one, read and written in the order of the steps;
on a CPU the host memory is the device's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from engine.decode_rows import TableChange
from kernels.decode_inputs import write_entries
from kernels.sample import DrawParams

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from numpy.typing import NDArray

    from engine.sampling_plan import SamplingPlan

_NUM_STAGED = 3
_MAX_ENTRIES = 1 << 15  # of one upload; more take several


class HostRows(NamedTuple):
    """Arrays `[max_rows]`, in the order of memory."""

    ends: NDArray[np.int64]  # number of tokens with the one computed last; 0: nothing computed
    seeds: NDArray[np.int64]
    top_p: NDArray[np.float64]
    scale: NDArray[np.float32]
    min_p: NDArray[np.float32]
    top_k: NDArray[np.int32]
    tokens: NDArray[np.int32]
    sources: NDArray[np.int32]  # of the tokens: a row of the last step's draws, or -1

    def set_params(self, plan: SamplingPlan) -> None:
        """How the first rows are drawn, as the rows of the plan."""
        num_rows = len(plan.rows)
        self.scale[:num_rows] = plan.scale
        self.min_p[:num_rows] = plan.min_p
        self.top_p[:num_rows] = plan.top_p
        self.top_k[:num_rows] = plan.top_k
        self.seeds[:num_rows] = plan.seeds

    def pad(self, begin: int, end: int) -> None:
        """Rows that compute nothing and take the best of whatever logits they get."""
        self.ends[begin:end] = 0
        self.sources[begin:end] = -1
        self.scale[begin:end] = 0.0


class DeviceRows(NamedTuple):
    """The same as tensors."""

    ends: torch.Tensor
    seeds: torch.Tensor
    top_p: torch.Tensor
    scale: torch.Tensor
    min_p: torch.Tensor
    top_k: torch.Tensor
    tokens: torch.Tensor
    sources: torch.Tensor

    def draw_params(self, num_rows: int) -> DrawParams:
        """A new token takes the index after the last one: the number of tokens before it."""
        parts = (self.scale, self.min_p, self.top_p, self.top_k, self.seeds, self.ends)
        return DrawParams(*(each[:num_rows] for each in parts))


_DTYPES = (
    torch.int64,
    torch.int64,
    torch.float64,
    torch.float32,
    torch.float32,
    torch.int32,
    torch.int32,
    torch.int32,
)


class RowInputs:
    """Memory for up to `max_rows` rows, and the block tables int32 `[max_rows, max_blocks]` on
    the device; what lies there beyond a sequence's blocks names blocks that exist."""

    def __init__(self, max_rows: int, max_blocks: int, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._max_entries = min(_MAX_ENTRIES, max_rows * max_blocks)
        num_tables = max_rows
        # Arrays of 4-byte items then begin at multiples of 16 bytes, as kernels are compiled for.
        max_rows = -(-max_rows // 4) * 4
        self._rows_bytes = max_rows * sum(dtype.itemsize for dtype in _DTYPES)
        num_bytes = self._rows_bytes + 8 * self._max_entries
        self._memory = [
            torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=self._on_gpu)
            for _ in range(_NUM_STAGED if self._on_gpu else 1)
        ]
        self._host = [
            HostRows(*(each.numpy() for each in _views(memory, max_rows)))
            for memory in self._memory
        ]
        self._copied: list[torch.Event | None] = [None] * len(self._memory)
        self._turn = 0
        self._on_device = self._memory[0]
        if self._on_gpu:
            self._on_device = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self.device_rows = DeviceRows(*_views(self._on_device, max_rows))
        self.tables = torch.zeros(num_tables, max_blocks, dtype=torch.int32, device=device)

    def next_rows(self) -> HostRows:
        """The next step's rows, to be filled; contents undefined."""
        self._turn = (self._turn + 1) % len(self._memory)
        copied = self._copied[self._turn]
        if copied is not None:
            copied.synchronize()
        return self._host[self._turn]

    def split(self, changes: SequenceOf[TableChange]) -> list[list[TableChange]]:
        """In parts of which each fits one upload; all but the last must go before the rows."""
        parts: list[list[TableChange]] = [[]]
        num_entries = 0
        for row, column, block_ids in changes:
            for begin in range(0, len(block_ids), self._max_entries):
                piece = block_ids[begin : begin + self._max_entries]
                if num_entries + len(piece) > self._max_entries:
                    parts.append([])
                    num_entries = 0
                parts[-1].append(TableChange(row, column + begin, piece))
                num_entries += len(piece)
        return parts

    def set_changes(self, changes: SequenceOf[TableChange]) -> int:
        """Lay changed entries behind the rows. Returns how many there are."""
        num_entries = sum(len(change.block_ids) for change in changes)
        if num_entries:
            width = self.tables.shape[1]
            memory = self.filled(num_entries)[self._rows_bytes :]
            entries = np.frombuffer(memory, np.int32).reshape(2, num_entries)
            begin = 0
            for row, column, block_ids in changes:
                end = begin + len(block_ids)
                first = row * width + column
                entries[0, begin:end] = np.arange(first, first + len(block_ids))
                entries[1, begin:end] = block_ids
                begin = end
        return num_entries

    def filled(self, num_entries: int) -> memoryview:
        """The bytes of the rows given last and of so many entries: for other ranks."""
        end = self._rows_bytes + 8 * num_entries
        return self._memory[self._turn].numpy()[:end].data

    def upload(self, num_entries: int = 0) -> DeviceRows:
        """Queue the copy of what was filled, and the changes of the tables."""
        begin, end = self._rows_bytes, self._rows_bytes + 8 * num_entries
        if self._on_gpu:
            source = self._memory[self._turn][:end]
            self._on_device[:end].copy_(source, non_blocking=True)
            copied = self._copied[self._turn]
            if copied is None:
                copied = self._copied[self._turn] = torch.Event(self._on_device.device)
            copied.record()
        if num_entries:
            entries = self._on_device[begin:end].view(torch.int32)
            write_entries(self.tables, entries[:num_entries], entries[num_entries:])
        return self.device_rows


def _views(memory: torch.Tensor, max_rows: int) -> list[torch.Tensor]:
    views = []
    begin = 0
    for dtype in _DTYPES:
        end = begin + max_rows * dtype.itemsize
        views.append(memory[begin:end].view(dtype))
        begin = end
    return views
