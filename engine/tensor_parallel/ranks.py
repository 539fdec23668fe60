"""What the ranks of one model do together inside a step.

All ranks run the same batches through their shards, so they reach the same calls in the same
order; each call below is a meeting of all of them.

    from_first      the embeddings of a step: only rank 0 knows the tokens
    sum             after the attention and after the MLP of each layer
    gather_logits   at the end: rank 0 gets all columns
    settle          where rank 0 must know that the others have written their KV

On a CPU, gloo over loopback. On GPUs see `gpu_ranks.py`.
"""

from __future__ import annotations

from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed

from engine.tensor_parallel.failures import RankLost

if TYPE_CHECKING:
    from collections.abc import Iterator

    from engine.tensor_parallel.shard import Shard
    from kernels.peer_sum import PeerInboxes

STALL_SECONDS = 120.0
# What is used of it is not typed.
c10d: Any = torch.distributed


class Ranks(Protocol):
    """One rank's view of all of them. Raises `RankLost` when one is gone and that shows."""

    @property
    def shard(self) -> Shard: ...

    @property
    def few_rows(self) -> PeerInboxes | None:
        """For products of up to 8 rows that sum while they are made; None: there are none here."""

    @property
    def one_row(self) -> PeerInboxes | None:
        """For `row_layer`, and for nothing else; None as above."""

    def from_first(self, x: torch.Tensor) -> torch.Tensor:
        """x of rank 0, on every rank; elsewhere the contents of x do not matter. In place."""

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of the x of all ranks, bit for bit the same on each. It may take the memory of
        x, or lie where the sum after the next will: use only the result, and not for long."""

    def gather_logits(self, part: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """`[num_rows, columns of this rank]` -> on rank 0 `[num_rows, vocab_size]`, valid until
        the logits of the next step are gathered. Other ranks get their part back."""

    def settle(self) -> None:
        """What every rank has queued so far happens before what rank 0 queues next."""

    def close(self) -> None:
        """Meets nobody."""


class CpuRanks:
    """Over gloo, between processes of one machine. `store`: where they find each other."""

    def __init__(self, shard: Shard, store: Any) -> None:
        self._shard = shard
        options = c10d.ProcessGroupGloo._Options()
        options._devices = [c10d.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = timedelta(seconds=STALL_SECONDS)
        with as_rank_lost():
            self._group = c10d.ProcessGroupGloo(store, shard.rank, shard.size, options)
        self._tick = torch.zeros(1)

    @property
    def shard(self) -> Shard:
        return self._shard

    @property
    def few_rows(self) -> PeerInboxes | None:
        return None

    @property
    def one_row(self) -> PeerInboxes | None:
        return None

    def from_first(self, x: torch.Tensor) -> torch.Tensor:
        with as_rank_lost():
            self._group.broadcast([x], first_rank_options()).wait()
        return x

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        with as_rank_lost():
            self._group.allreduce([x]).wait()
        return x

    def gather_logits(self, part: torch.Tensor, vocab_size: int) -> torch.Tensor:
        columns = -(-vocab_size // self._shard.size)
        padded = torch.nn.functional.pad(part, (0, columns - part.shape[1]))
        parts = [torch.empty_like(padded) for _ in range(self._shard.size)]
        with as_rank_lost():
            self._group.allgather([parts], [padded]).wait()
        return part if self._shard.rank else torch.cat(parts, dim=1)[:, :vocab_size]

    def settle(self) -> None:
        self.sum(self._tick)

    def close(self) -> None:
        self._group.abort()


def first_rank_options() -> Any:
    options = c10d.BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    return options


@contextmanager
def as_rank_lost() -> Iterator[None]:
    """The libraries below say only that a connection broke."""
    try:
        yield
    except RuntimeError as error:
        raise RankLost(f"The ranks of this node cannot reach each other: {error}") from error
