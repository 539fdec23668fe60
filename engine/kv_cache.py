"""The paged KV memory of a whole model, and the facts that two nodes must share to exchange it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """Shape of the KV of one block.

    The unit of every move is one layer of one block: contiguous, `[2, num_kv_heads,
    block_size, head_size]`, keys before values.
    """

    num_layers: int
    block_size: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype

    @property
    def unit_bytes(self) -> int:
        """Bytes of one layer of one block."""
        return 2 * self.num_kv_heads * self.block_size * self.head_size * self.dtype.itemsize

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return self.num_layers * self.unit_bytes

    def shard(self, num_shards: int) -> KVLayout:
        """What one of several ranks holds: an equal part of the KV heads."""
        return replace(self, num_kv_heads=self.num_kv_heads // num_shards)

    def compatibility_hash(self, model_key: str, protocol_version: int) -> str:
        """Hex digest, equal on two nodes exactly when one may use KV the other computed.

        `model_key` stands for the weights: the same layout under other weights is other KV.
        """
        facts = (
            f"protocol={protocol_version}",
            f"layers={self.num_layers}",
            f"block_size={self.block_size}",
            f"kv_heads={self.num_kv_heads}",
            f"head_size={self.head_size}",
            f"dtype={self.dtype}",
            f"model={model_key}",  # last: it may hold any character
        )
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32]


class KVCache:
    """The pool: `tensor` is `[num_layers, num_blocks, 2, num_kv_heads, block_size, head_size]`.

    `layers[i]` is the part of layer i, as the kernels take it.
    """

    __slots__ = ("layers", "layout", "tensor")

    def __init__(self, tensor: torch.Tensor, layout: KVLayout) -> None:
        self.tensor = tensor
        self.layout = layout
        self.layers: tuple[torch.Tensor, ...] = tensor.unbind(0)

    @classmethod
    def allocate(cls, layout: KVLayout, num_blocks: int, device: torch.device) -> KVCache:
        """Zeroed: what was never written must still be finite, since masked KV is multiplied."""
        num_bytes = num_blocks * layout.block_bytes
        if device.type == "cpu":
            # The system's zero pages: a block takes memory when it is first written.
            return cls.over(torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)), layout)
        return cls.over(torch.zeros(num_bytes, dtype=torch.uint8, device=device), layout)

    @classmethod
    def over(cls, memory: torch.Tensor, layout: KVLayout) -> KVCache:
        """As many blocks as `memory` has, uint8 `[num_blocks * block_bytes]`, zeroed."""
        shape = (2, layout.num_kv_heads, layout.block_size, layout.head_size)
        return cls(memory.view(layout.dtype).view(layout.num_layers, -1, *shape), layout)

    @property
    def num_blocks(self) -> int:
        return self.tensor.shape[1]

    def as_bytes(self) -> torch.Tensor:
        """uint8 `[num_layers, num_blocks, unit_bytes]` of the same memory, for moving blocks."""
        return self.tensor.view(self.layout.num_layers, self.num_blocks, -1).view(torch.uint8)
