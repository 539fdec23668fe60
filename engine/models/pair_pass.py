"""A decode step of so many sequences that they fill two tiles of rows.

1. `PairPass.of` looks at a decoder's layers once their weights are packed: all must be kept in ways
   that `pair_mlp` knows, on a GPU that has it.
2. In a step that `takes` its rows the products whose inner dimension is cut leave their parts as
   they are. The norm that follows adds them to the stream: what a kernel of its own would write and
   read once more stays in the second-level cache.

The rest of the step is that of any other one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from engine.models.linear import Linear
from kernels.pair_mlp import fits_pair_mlp, new_counters, pair_mlp
from kernels.rms_norm import rms_norm
from kernels.sum_rms_norm import add_parts, sum_rms_norm

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as SequenceOf

    from engine.batch import Batch
    from engine.models.decoder_layer import DecoderLayer, StepPlan

# Rows of a step: with fewer, two tiles of 128 are emptier than the library's.
_LEAST_ROWS, _MOST_ROWS = 193, 256
_SLICES = 2  # of the inner dimension of the output product, to fill the multiprocessors


class Weights(NamedTuple):
    """Of the matrices behind a layer's attention."""

    output: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class PairPass:
    """The layers of one decoder. Steps must follow each other: they share counters."""

    def __init__(self, layers: SequenceOf[DecoderLayer], weights: SequenceOf[Weights]) -> None:
        """`weights`: of each of the layers."""
        self._layers = layers
        self._weights = weights
        self._counters = new_counters(weights[0].down)

    @classmethod
    def of(cls, layers: SequenceOf[DecoderLayer]) -> PairPass | None:
        """None where ordinary passes are to be taken."""
        weights = [own for layer in layers if (own := weights_of(layer)) is not None]
        if len(weights) < len(layers):
            return None
        fits = all(fits_pair_mlp(own.gate_up, own.down) for own in weights)
        return cls(layers, weights) if fits else None

    def takes(self, batch: Batch) -> bool:
        """Whether such a step is for this pass."""
        return batch.is_decode and _LEAST_ROWS <= batch.num_samples <= _MOST_ROWS

    def run(
        self,
        residual: torch.Tensor,
        batch: Batch,
        kv_layers: SequenceOf[torch.Tensor],
        cos_sin: torch.Tensor,
        plan: StepPlan,
        on_layer: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """The stream behind all layers, in the memory of `residual`; arguments as in
        `Decoder.forward`."""
        last = len(self._layers) - 1
        first = self._layers[0]
        x = rms_norm(residual, first.input_norm, first.eps)
        for index, (layer, own) in enumerate(zip(self._layers, self._weights, strict=True)):
            query = layer.store(layer.qkv(x), batch, kv_layers[index], cos_sin, plan)
            if on_layer is not None:
                on_layer(index)
            attended = layer.attention(query, batch, kv_layers[index], plan)
            parts = cut_product(attended, own.output)
            x = sum_rms_norm(residual, parts, layer.post_norm, layer.eps)
            parts = pair_mlp(x, own.gate_up, own.down, self._counters)
            if index < last:
                x = sum_rms_norm(residual, parts, self._layers[index + 1].input_norm, layer.eps)
        return add_parts(residual, parts)


def weights_of(layer: DecoderLayer) -> Weights | None:
    """None where they are kept in other ways than as plain weights."""
    plain = [
        matrix.weight
        for matrix in (layer.output, layer.gate_up, layer.down)
        if isinstance(matrix, Linear) and matrix.bias is None
    ]
    return Weights(*plain) if len(plain) == len(Weights._fields) else None


def cut_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Parts of `x @ weight.T`, each over a slice of the inner dimension: float32 `[num_parts,
    num_rows, out_size]`. The library's, which would sum them in a kernel of its own."""
    num_rows, in_size = x.shape
    slices = x.view(num_rows, _SLICES, in_size // _SLICES).transpose(0, 1)
    columns = weight.view(len(weight), _SLICES, in_size // _SLICES).permute(1, 2, 0)
    if not x.is_cuda:
        return torch.bmm(slices.float(), columns.float())
    return torch.bmm(slices, columns, out_dtype=torch.float32)
