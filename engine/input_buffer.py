"""Where the inputs of a pass over prompts lie: one run of host memory, sent to the device in one
copy. Those of rows: `row_inputs.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray


class BatchShape(NamedTuple):
    """What fixes where each array lies."""

    num_tokens: int
    num_rows: int
    num_samples: int
    table_width: int

    @property
    def num_bytes(self) -> int:
        return _places(self)[-1].end


class _Place(NamedTuple):
    begin: int
    end: int
    size: tuple[int, ...]


class HostArrays(NamedTuple):
    """The arrays of one step on the host, in their order in memory."""

    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    slot_mapping: NDArray[np.int64]
    sample_indices: NDArray[np.int64]
    sample_rows: NDArray[np.int64]
    seq_lens: NDArray[np.int32]
    cu_seqlens_q: NDArray[np.int32]
    block_tables: NDArray[np.int32]


_ITEM_BYTES = (8, 8, 8, 8, 8, 4, 4, 4)  # of the arrays, in their order

# Where each begins: kernels are compiled apart for addresses that are no multiple of 16, which
# would happen in the middle of serving.
_ALIGNMENT = 16


def _places(shape: BatchShape) -> list[_Place]:
    """Where each array lies, in bytes."""
    tokens, rows, samples, width = shape
    by_token, by_sample = ((tokens,),) * 3, ((samples,),) * 2
    sizes = (*by_token, *by_sample, (rows,), (rows + 1,), (rows, width))
    places = []
    begin = 0
    for size, item_bytes in zip(sizes, _ITEM_BYTES, strict=True):
        count = size[0] * size[1] if len(size) == 2 else size[0]
        end = begin + count * item_bytes
        places.append(_Place(begin, end, size))
        begin = -(-end // _ALIGNMENT) * _ALIGNMENT
    return places


class _Staging:
    """Host memory of one step. `free` is recorded when the copy that reads it is issued."""

    __slots__ = ("arrays", "free", "memory", "shape", "tensors")

    def __init__(self, num_bytes: int, *, pinned: bool) -> None:
        self.memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned)
        self.free: torch.Event | None = None
        self.shape: BatchShape | None = None  # of the views below, kept for steps alike
        self.arrays: HostArrays | None = None
        self.tensors: list[torch.Tensor] = []


class InputBuffer:
    """Host memory for the inputs of a step and, on a GPU, its twin on the device.

    On a GPU two host buffers take turns, so filling one never waits for the copy of the other
    unless two steps are still in flight.
    """

    def __init__(self, largest: BatchShape, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        num_bytes = largest.num_bytes
        self._staging = [_Staging(num_bytes, pinned=on_gpu) for _ in range(2 if on_gpu else 1)]
        self._turn = 0
        self._device_memory = (
            torch.empty(num_bytes, dtype=torch.uint8, device=device)
            if on_gpu
            else self._staging[0].memory
        )
        self._on_gpu = on_gpu

    def arrays(self, shape: BatchShape) -> HostArrays:
        """The next step's arrays, to be filled; contents undefined."""
        self._turn = (self._turn + 1) % len(self._staging)
        staging = self._staging[self._turn]
        if staging.free is not None:
            staging.free.synchronize()
        if staging.arrays is None or staging.shape != shape:
            memory = staging.memory.numpy()
            staging.shape = shape
            staging.arrays = HostArrays(*(_host_view(memory, p, i) for i, p in _each(shape)))
            staging.tensors = self._device_views(shape)
        return staging.arrays

    @property
    def filled(self) -> memoryview:
        """The bytes of the arrays that were given last, to be sent elsewhere or filled at once."""
        staging = self._staging[self._turn]
        end = staging.shape.num_bytes if staging.shape is not None else 0
        return staging.memory.numpy()[:end].data

    def upload(self) -> list[torch.Tensor]:
        """Send what was filled; the arrays on the device, in the order of `HostArrays`."""
        staging = self._staging[self._turn]
        if self._on_gpu and staging.shape is not None:
            end = staging.shape.num_bytes
            self._device_memory[:end].copy_(staging.memory[:end], non_blocking=True)
            staging.free = staging.free or torch.Event(self._device_memory.device)
            staging.free.record()
        return staging.tensors

    def _device_views(self, shape: BatchShape) -> list[torch.Tensor]:
        """Where the arrays of `shape` lie on the device."""
        return [_device_view(self._device_memory, p, i) for i, p in _each(shape)]


def _each(shape: BatchShape) -> enumerate[_Place]:
    return enumerate(_places(shape))


def _host_view(memory: NDArray[np.uint8], place: _Place, index: int) -> NDArray[Any]:
    dtype = np.int64 if _ITEM_BYTES[index] == 8 else np.int32
    return memory[place.begin : place.end].view(dtype).reshape(place.size)


def _device_view(memory: torch.Tensor, place: _Place, index: int) -> torch.Tensor:
    dtype = torch.int64 if _ITEM_BYTES[index] == 8 else torch.int32
    return memory[place.begin : place.end].view(dtype).view(place.size)
