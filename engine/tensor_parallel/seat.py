"""One rank's place among the ranks of its engine, while the engine is built.

connect        the sums and gathers of a step
allocate_kv    pools of the same size; rank 0 maps those of all, to move blocks between nodes
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from engine.kv_cache import KVCache
from engine.tensor_parallel.gpu_ranks import GpuRanks
from engine.tensor_parallel.peer_memory import export, map_file, open_peer, shared_file
from engine.tensor_parallel.ranks import CpuRanks, c10d

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine.kv_cache import KVLayout
    from engine.limits import EngineLimits
    from engine.models.config import ModelConfig
    from engine.tensor_parallel.ranks import Ranks
    from engine.tensor_parallel.rendezvous import Rendezvous
    from engine.tensor_parallel.shard import Shard
    from engine.tensor_parallel.wire import Channel


@dataclass(frozen=True, slots=True)
class Seat:
    """`channels`: to all workers on rank 0, to rank 0 on a worker. `folder`: one for all ranks."""

    shard: Shard
    rendezvous: Rendezvous
    channels: Sequence[Channel]
    folder: str

    def connect(self, model: ModelConfig, limits: EngineLimits) -> Ranks:
        """Raises `ConfigError` or `RankLost` when the ranks cannot reach each other."""
        shard = self.shard.fitted(model)
        store = c10d.FileStore(str(Path(self.folder) / "store"), self.shard.size)
        self.rendezvous.exchange({})  # nobody waits for one that did not get this far
        if not limits.on_gpu:
            return CpuRanks(shard, store)
        columns = -(-model.vocab_size // shard.size)
        return GpuRanks(
            shard,
            store,
            self.rendezvous,
            limits.device,
            largest_small=limits.max_num_seqs * model.hidden_size * limits.dtype.itemsize,
            largest_sum=limits.max_num_batched_tokens * model.hidden_size,
            hidden_size=model.hidden_size,
            logits_shape=(limits.max_num_seqs, columns),
            dtype=limits.dtype,
        )

    def allocate_kv(
        self, layout: KVLayout, num_blocks: int, device: torch.device
    ) -> tuple[KVCache, tuple[torch.Tensor, ...]]:
        """The pool of this rank, `layout` being that of its shard, with as many blocks as every
        rank has room for; and on rank 0 the pools of all ranks, as `KVCache.as_bytes`."""
        counts = self.rendezvous.exchange({"num_blocks": num_blocks})
        num_blocks = min(int(each["num_blocks"]) for each in counts)
        if device.type == "cpu":
            memories = self._shared_memory(num_blocks * layout.block_bytes)
            own = KVCache.over(memories[self.shard.rank], layout)
        else:
            own = KVCache.allocate(layout, num_blocks, device)
            torch.cuda.synchronize(device)
            facts = self.rendezvous.exchange({"pool": export(own.tensor)})
            if self.shard.rank:
                return own, ()
            memories = (own.tensor, *(open_peer(each["pool"], device) for each in facts[1:]))
        shape = own.as_bytes().shape
        return own, tuple(each.view(torch.uint8).view(shape) for each in memories)

    def _shared_memory(self, num_bytes: int) -> tuple[torch.Tensor, ...]:
        """uint8 `[num_bytes]` in main memory for each rank, mapped by all of them; zeroed."""
        total = num_bytes * self.shard.size
        if self.shard.rank == 0:
            descriptor = shared_file(total)
            for channel in self.channels:
                channel.send_descriptor(descriptor)
        else:
            descriptor = self.channels[0].receive_descriptor()
        memory = map_file(descriptor, total)
        os.close(descriptor)
        return memory.view(self.shard.size, num_bytes).unbind()
