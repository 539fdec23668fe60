"""Sums of prompts' tensors: each rank reads the others' summands (`kernels.peer_add`).

Every rank has two buffers that all ranks map, and sums take turns in them:

    1. `put` brings the summand of sum n into buffer n % 2, unless it was made there already.
    2. All ranks meet.
    3. `add` writes the sum into the own buffer (n + 1) % 2. The residual stream is that sum, so the
       next summand of rank 0, which adds to the stream in place, is made where it belongs.

Nobody overwrites what another rank may still read: who writes to buffer (n + 1) % 2 has met the
others in sum n, and they read that buffer, in sum n - 1, before they came there.

Which buffer is next is known on the host: not for captured graphs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from engine.tensor_parallel.peer_memory import export, open_peer
from kernels.peer_add import peer_add

if TYPE_CHECKING:
    from engine.tensor_parallel.rendezvous import Rendezvous

# Two ranks read what NCCL would move, in one trip instead of two; more would read more than it.
MOST_READERS = 2


class LargeSums:
    """`buffers`: of all ranks in their order, each `[2, most elements]`."""

    def __init__(self, rank: int, buffers: list[torch.Tensor]) -> None:
        self._rank = rank
        self._buffers = buffers
        self._turn = 0
        self._parts: list[list[torch.Tensor]] = []  # of all buffers, by turn: as long as a summand

    @classmethod
    def share(
        cls,
        rank: int,
        rendezvous: Rendezvous,
        device: torch.device,
        num_elements: int,
        dtype: torch.dtype,
    ) -> LargeSums:
        """All ranks call this together."""
        own = torch.zeros(2, num_elements, dtype=dtype, device=device)
        torch.cuda.synchronize(device)
        facts = rendezvous.exchange({"sums": export(own)})
        return cls(
            rank,
            [
                own if other == rank else open_peer(each["sums"], device).view(dtype).view_as(own)
                for other, each in enumerate(facts)
            ],
        )

    def holds(self, x: torch.Tensor) -> bool:
        size, own = x.numel(), self._buffers[self._rank]
        return x.dtype == own.dtype and size % 8 == 0 and size <= own.shape[1]

    def put(self, x: torch.Tensor) -> None:
        """x becomes the own summand of the next sum; then all ranks must meet."""
        place = self._cut(x.numel())[self._turn][self._rank]
        if place.data_ptr() != x.data_ptr():
            place.copy_(x.reshape(-1))

    def add(self, shape: torch.Size) -> torch.Tensor:
        """The sum of what all ranks have put, valid until the sum after the next is put."""
        parts = self._cut(shape.numel())
        summands = parts[self._turn]
        self._turn = 1 - self._turn
        return peer_add(summands, parts[self._turn][self._rank]).view(shape)

    def _cut(self, size: int) -> list[list[torch.Tensor]]:
        """Made anew where the size changes: the sums of a step are as long as each other."""
        if not self._parts or len(self._parts[0][0]) != size:
            self._parts = [[each[turn, :size] for each in self._buffers] for turn in range(2)]
        return self._parts
