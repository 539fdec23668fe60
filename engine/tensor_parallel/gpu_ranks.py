"""The ranks of one model on the GPUs of one machine.

Small tensors (decode steps, short prompts) are summed by `kernels.peer_sum`, one kernel over
memory that the GPUs share. Larger ones are read from each other by two ranks (`large_sums.py`); of
more, and in captured graphs, they go to NCCL. All of it is queued on the current stream.

Logits are pushed: each rank copies its columns into the buffer of rank 0, where all meet when they
have arrived (`kernels.peer_push`). A rank writes there again only after the embeddings of the next
step, which rank 0 sends behind its sampling of this one: so logits must be read on the stream of
the step.

NVLink multicast is not used.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from engine.tensor_parallel.large_sums import MOST_READERS, LargeSums
from engine.tensor_parallel.peer_memory import export, open_peer
from engine.tensor_parallel.ranks import as_rank_lost, c10d, first_rank_options
from kernels.dispatch import num_multiprocessors
from kernels.peer_push import peer_push
from kernels.peer_sum import MAX_PROGRAMS, PeerInboxes, inbox_words, peer_meet, peer_sum
from kernels.skinny_stream import MAX_ROWS

if TYPE_CHECKING:
    from engine.tensor_parallel.rendezvous import Rendezvous
    from engine.tensor_parallel.shard import Shard

_SETTINGS = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "TORCH_NCCL_ENABLE_MONITORING": "0",  # `crew.py` watches the ranks
}


class GpuRanks:
    """See the module. `largest_small`: bytes of the largest tensor of a decode step;
    `largest_sum`: elements of the largest of any; `hidden_size`: of one row; `logits_shape`: most
    rows, and the columns of one rank."""

    def __init__(
        self,
        shard: Shard,
        store: Any,
        rendezvous: Rendezvous,
        device: torch.device,
        *,
        largest_small: int,
        largest_sum: int,
        hidden_size: int,
        logits_shape: tuple[int, int],
        dtype: torch.dtype,
    ) -> None:
        os.environ.update(_SETTINGS)
        self._shard = shard
        self._mapped: list[torch.Tensor] = []
        self._inboxes = self._share_inboxes(
            rendezvous, device, inbox_words(largest_small), MAX_PROGRAMS
        )
        num_programs = num_multiprocessors(device)
        self._few_rows = self._share_inboxes(
            rendezvous, device, MAX_ROWS * hidden_size, num_programs
        )
        self._one_row = self._share_inboxes(rendezvous, device, hidden_size, num_programs)
        self._large: LargeSums | None = None
        if shard.size <= MOST_READERS:
            self._large = LargeSums.share(shard.rank, rendezvous, device, largest_sum, dtype)
        self._logits = self._share_logits(rendezvous, device, logits_shape, dtype)
        self._tick = torch.zeros(1, dtype=torch.int32, device=device)
        options = c10d.ProcessGroupNCCL.Options()
        self._group = c10d.ProcessGroupNCCL(store, shard.rank, shard.size, options)
        with as_rank_lost():
            self._group.allreduce([self._tick]).wait()  # connects, which a capture could not
        self.settle()
        torch.cuda.synchronize(device)

    @property
    def shard(self) -> Shard:
        return self._shard

    @property
    def few_rows(self) -> PeerInboxes | None:
        return self._few_rows

    @property
    def one_row(self) -> PeerInboxes | None:
        return self._one_row

    def from_first(self, x: torch.Tensor) -> torch.Tensor:
        if self._inboxes.holds(x):
            return peer_sum(x, self._inboxes, contributes=self._shard.rank == 0)
        with as_rank_lost():
            self._group.broadcast([x], first_rank_options()).wait()
        return x

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        if self._inboxes.holds(x):
            return peer_sum(x, self._inboxes)
        large = self._large
        if large is not None and large.holds(x) and not torch.cuda.is_current_stream_capturing():
            large.put(x)
            self.settle()
            return large.add(x.shape)
        with as_rank_lost():
            self._group.allreduce([x]).wait()
        return x

    def gather_logits(self, part: torch.Tensor, vocab_size: int) -> torch.Tensor:
        peer_push(part, self._logits, self._inboxes)
        if self._shard.rank:
            return part
        logits = self._logits[: len(part), :vocab_size]
        return logits if logits.is_contiguous() else logits.contiguous()

    def settle(self) -> None:
        peer_meet(self._tick, self._inboxes)

    def close(self) -> None:
        self._group.abort()

    def _share_inboxes(
        self, rendezvous: Rendezvous, device: torch.device, capacity: int, num_programs: int
    ) -> PeerInboxes:
        rank, size = self._shard.rank, self._shard.size
        own = torch.zeros(2, size, capacity, dtype=torch.int64, device=device)
        torch.cuda.synchronize(device)
        facts = rendezvous.exchange({"inbox": export(own)})
        # Kept as long as the group: closing a mapping would take the memory from under a kernel.
        mapped = [
            own if other == rank else open_peer(each["inbox"], device)
            for other, each in enumerate(facts)
        ]
        self._mapped += mapped
        return PeerInboxes(
            rank=rank,
            size=size,
            addresses=torch.tensor(
                [each.data_ptr() for each in mapped], dtype=torch.int64, device=device
            ),
            epochs=torch.zeros(num_programs, dtype=torch.int32, device=device),
            capacity=capacity,
        )

    def _share_logits(
        self,
        rendezvous: Rendezvous,
        device: torch.device,
        shape: tuple[int, int],
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """The buffer of rank 0, `[rows, size * columns]`, on every rank."""
        num_rows, columns = shape[0], shape[1] * self._shard.size
        if self._shard.rank == 0:
            own = torch.zeros(num_rows, columns, dtype=dtype, device=device)
            torch.cuda.synchronize(device)
            rendezvous.exchange({"logits": export(own)})
            return own
        first = rendezvous.exchange({})[0]
        return open_peer(first["logits"], device).view(dtype).view(num_rows, columns)
