"""Lists of integers that kernels read: ids of blocks, and positions.

The layers of a chunk differ in nothing else, so a list is brought to the device once, and found
again, mostly by being the same object. Who calls `get` does so on a stream that follows all readers
of lists and that they all follow: the memory of one that is put out is written anew behind them.
"""

from __future__ import annotations

from array import array
from collections import deque

import torch

NUM_KEPT = 128
_RECENT = 4  # looked for without a look at what is in them: two of each of two frames


class DeviceLists:
    def __init__(self, device: torch.device, max_length: int, num_kept: int = NUM_KEPT) -> None:
        """All memory is taken now: pinning some would hold up the first frames of a prompt."""
        pinned = torch.empty(
            (num_kept, max_length), dtype=torch.int64, pin_memory=device.type == "cuda"
        )
        on_device = torch.empty((num_kept, max_length), dtype=torch.int64, device=device)
        self._free = [_Numbers(*rows) for rows in zip(pinned, on_device, strict=True)]
        self._kept: dict[tuple[int, ...], _Numbers] = {}  # the one used last is last
        self._recent: deque[tuple[tuple[int, ...], _Numbers]] = deque(maxlen=_RECENT)

    def recent(self, numbers: tuple[int, ...]) -> torch.Tensor | None:
        """As `get`, if the same object was asked for a moment ago."""
        for each, found in self._recent:
            if each is numbers:
                return found.on_device
        return None

    def get(self, numbers: tuple[int, ...]) -> torch.Tensor:
        """int64 `[max_length]` on the device; the first are these. Copied on the current stream."""
        recent = self.recent(numbers)
        if recent is not None:
            return recent
        found = self._find(numbers)
        self._recent.append((numbers, found))
        return found.on_device

    def _find(self, numbers: tuple[int, ...]) -> _Numbers:
        kept = self._kept.pop(numbers, None)
        if kept is None:
            if self._free:
                kept = self._free.pop()
            else:
                kept = self._kept.pop(next(iter(self._kept)))
                self._forget(kept)
            kept.fill(numbers)
        self._kept[numbers] = kept
        return kept

    def _forget(self, kept: _Numbers) -> None:
        """Its memory gets other numbers."""
        others = [entry for entry in self._recent if entry[1] is not kept]
        self._recent = deque(others, maxlen=_RECENT)


class _Numbers:
    """A list on the device, and the pinned memory that it comes from."""

    __slots__ = ("_copied", "_pinned", "_view", "on_device")

    def __init__(self, pinned: torch.Tensor, on_device: torch.Tensor) -> None:
        self._pinned, self.on_device = pinned, on_device
        self._view = pinned.numpy()
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied.record()  # which makes it

    def fill(self, numbers: tuple[int, ...]) -> None:
        self._copied.synchronize()  # of the list before, long ago
        num = len(numbers)
        self._view[:num] = array("q", numbers)
        self.on_device[:num].copy_(self._pinned[:num], non_blocking=True)
        self._copied.record()
