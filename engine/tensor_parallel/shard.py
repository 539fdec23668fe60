"""Which part of a model one rank holds. Pure: no torch, no processes.

Attention is split by heads and the MLP by columns, so that between the two halves of a layer
nothing is exchanged (Megatron-LM, Shoeybi et al. 2019): q, k, v, gate and up are cut by rows of
their matrices, o and down by columns, and the products of these two are summed over the ranks.
The output matrix is cut by tokens of the vocabulary. The input embedding is whole, on rank 0
alone, which is the only one that knows token ids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cluster.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine.models.config import ModelConfig

_CUT_BY_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_CUT_BY_COLUMNS = ("o_proj", "down_proj")
# Kinds of views with an entry for each head; of inputs alone; with a column
# for each input or group of inputs.
_OF_HEADS = ("k_scale", "v_scale")
_OF_INPUTS = ("input_scale", "order")
_OF_COLUMNS = ("weight", "qweight", "scales", "zeros")
_VOCABULARY = ("lm_head.weight", "model.embed_tokens.weight")


@dataclass(frozen=True, slots=True)
class Shard:
    """Rank `rank` of `size`. `Shard()` is the whole model."""

    rank: int = 0
    size: int = 1
    vocab_size: int = 0  # of the model, once it is known

    @property
    def is_whole(self) -> bool:
        return self.size == 1

    def fitted(self, model: ModelConfig) -> Shard:
        """For this model. Raises `ConfigError` when it cannot be cut into `size` equal parts."""
        for what, count in (
            ("attention heads", model.num_heads),
            ("key/value heads", model.num_kv_heads),
            ("columns of the MLP", model.intermediate_size),
        ):
            if count % self.size:
                raise ConfigError(
                    f"--tensor-parallel-size {self.size} does not divide the model's {count} "
                    f"{what}.",
                    param="tensor_parallel_size",
                )
        return replace(self, vocab_size=model.vocab_size)

    def of_model(self, model: ModelConfig) -> ModelConfig:
        """The same model with this rank's heads and columns."""
        return replace(
            model,
            num_heads=model.num_heads // self.size,
            num_kv_heads=model.num_kv_heads // self.size,
            intermediate_size=model.intermediate_size // self.size,
        )

    def range_of(self, count: int) -> tuple[int, int]:
        """First index and number of this rank's part of `count` things; the last may get fewer."""
        each = -(-count // self.size)
        begin = min(self.rank * each, count)
        return begin, min(each, count - begin)

    def cut_dim(self, name: str) -> int | None:
        """The dimension along which this view (`engine/weight_views.py`) is cut; None: each rank
        has it all."""
        if self.is_whole:
            return None
        if name in _VOCABULARY:
            return None if self.holds_embedding and name != "lm_head.weight" else 0
        module, _, kind = name.rpartition(".")
        matrix = module.rpartition(".")[2]
        if kind in _OF_HEADS or (matrix in _CUT_BY_ROWS and kind not in _OF_INPUTS):
            return 0
        if matrix in _CUT_BY_COLUMNS and kind in _OF_COLUMNS:
            return 1
        return None

    @property
    def holds_embedding(self) -> bool:
        return self.rank == 0

    def whole_shape(self, name: str, part: Sequence[int]) -> tuple[int, ...]:
        """Shape of a tensor of which this rank has a part of shape `part`."""
        dim = self.cut_dim(name)
        if dim is None:
            return tuple(part)
        count = self.vocab_size if name in _VOCABULARY else part[dim] * self.size
        return (*part[:dim], count, *part[dim + 1 :])


WHOLE = Shard()
