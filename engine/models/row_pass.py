"""A decode step of one sequence, with one kernel from each layer's attention to the next one's.

1. `RowPass.of` looks at a decoder's layers once their weights are packed: all must be kept in ways
   that the kernel knows, on a GPU that has it.
2. A step makes the first layer's queries as any pass does. From then on `row_layer` takes what a
   layer has attended to, and gives the stream behind it and the queries of the next one, whose KV
   it has stored.

The step's attention, and all it needs for it, is that of any other decode step.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch

from engine.models.linear import Linear
from engine.models.quantized_linear import Float8Linear
from engine.tensor_parallel.sharded import SummedMatrix
from kernels.row_layer import (
    COUNTERS,
    HEAD_UNIT,
    Heads,
    Places,
    RowMatrix,
    Transform,
    fits_row_layer,
    row_layer,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as SequenceOf

    from engine.batch import Batch
    from engine.models.decoder_layer import DecoderLayer, StepPlan
    from engine.models.linear import Matrix
    from engine.tensor_parallel.ranks import Ranks


class RowPass:
    """The layers of one decoder. Steps must follow each other: they share counters."""

    def __init__(
        self,
        layers: SequenceOf[DecoderLayer],
        halves: SequenceOf[tuple[Transform, RowMatrix]],
        ranks: Ranks | None = None,
    ) -> None:
        """`halves`: of each of the layers, of which there are two at least."""
        self._layers = layers
        self._halves = halves
        self._ranks = ranks
        device = layers[0].input_norm.device
        self._counters = torch.zeros(len(layers), COUNTERS, dtype=torch.int32, device=device)

    @classmethod
    def of(cls, layers: SequenceOf[DecoderLayer], ranks: Ranks | None) -> RowPass | None:
        """None where ordinary passes are to be taken, which is the same on all ranks."""
        num_ranks = 1 if ranks is None else ranks.shard.size
        halves = [halves_of(layer) for layer in layers]
        known = [half for half in halves if half is not None and fits_row_layer(*half, num_ranks)]
        return cls(layers, known, ranks) if len(known) == len(layers) >= 2 else None

    def run(
        self,
        residual: torch.Tensor,
        batch: Batch,
        kv_layers: SequenceOf[torch.Tensor],
        cos_sin: torch.Tensor,
        plan: StepPlan,
        on_layer: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """The stream `[1, hidden_size]` behind all layers; arguments as in `Decoder.forward`."""
        first, last = self._layers[0], len(self._layers) - 1
        with ExitStack() as when_broken_off:
            # The next layer cleans the counters of the last, and would not come.
            when_broken_off.callback(self._counters.zero_)
            qkv = first.qkv.normed(residual, first.input_norm, first.eps)
            query = first.store(qkv, batch, kv_layers[0], cos_sin, plan)
            for index, layer in enumerate(self._layers):
                if on_layer is not None and self._ranks is None:
                    on_layer(index)
                attended = layer.attention(query, batch, kv_layers[index], plan)
                heads = None
                if index < last:
                    heads = self._heads(index + 1, batch, kv_layers[index + 1], cos_sin)
                residual, qkv = self._transform(index, attended, residual, heads)
                if on_layer is not None and self._ranks is not None:
                    on_layer(index)  # behind a sum: the KV of the other ranks is written, too
                if heads is None:
                    break
                if heads.places is None:
                    kv_layer = kv_layers[index + 1]
                    query = self._layers[index + 1].store(qkv, batch, kv_layer, cos_sin, plan)
                else:
                    query = qkv[:, : query.shape[1] * query.shape[2]].view(query.shape)
            when_broken_off.pop_all()
        return residual

    def _heads(
        self, index: int, batch: Batch, kv_layer: torch.Tensor, cos_sin: torch.Tensor
    ) -> Heads:
        """Of a layer. Where heads are normed too, its `store` does that and what follows."""
        layer, (_, qkv) = self._layers[index], self._halves[index]
        places = None
        if layer.q_norm is None and kv_layer.shape[-1] % HEAD_UNIT == 0:
            places = Places(kv_layer, batch.slot_mapping, batch.positions, cos_sin, layer.kv_scales)
        return Heads(qkv, layer.input_norm, places)

    def _transform(
        self,
        index: int,
        attended: torch.Tensor,
        residual: torch.Tensor,
        heads: Heads | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return row_layer(
            attended,
            residual,
            self._halves[index][0],
            heads,
            self._layers[index].eps,
            self._counters[index],
            self._counters[index - 1],
            None if self._ranks is None else self._ranks.one_row,
        )


def row_matrix(matrix: Matrix) -> RowMatrix | None:
    """Its weights as the kernel takes them, if it does: those of this rank."""
    if isinstance(matrix, SummedMatrix):
        return None if matrix.has_bias else row_matrix(matrix.own)
    if isinstance(matrix, Linear):
        return RowMatrix(matrix.weight, None, matrix.bias)
    if isinstance(matrix, Float8Linear):
        return RowMatrix(matrix.weight, matrix.weight_scale, matrix.bias)
    return None


def halves_of(layer: DecoderLayer) -> tuple[Transform, RowMatrix] | None:
    """What a layer does behind its attention, and the product before, if they are of such kinds."""
    qkv, output, gate_up, down = map(row_matrix, layer.matrices())
    if qkv is None or output is None or gate_up is None or down is None:
        return None
    return Transform(output, gate_up, down, layer.post_norm), qkv
