"""A decode step of so many sequences that they fill two tiles of 128 rows.

1. `PairPass.of` looks at a decoder's layers once their weights are packed: all must be kept in ways
   that `pair_mlp` knows, on a GPU that has it.
2. In a step that it `takes` the MLP of a layer is one kernel, which leaves its result in parts. The
   norm in front of the next layer adds them to the stream on its way: they are still in the
   second-level cache, and no kernel writes their sum only for the next one to read it.

The rest of the step is that of any other one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from engine.models.linear import Linear
from kernels.pair_mlp import fits_pair_mlp, new_counters, pair_mlp
from kernels.rms_norm import rms_norm
from kernels.sum_rms_norm import add_parts, sum_rms_norm

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as SequenceOf

    import torch

    from engine.batch import Batch
    from engine.models.decoder_layer import DecoderLayer, StepPlan

# Of a step. With fewer rows two tiles of 128 are too empty: at 224 the library is even with it.
_LEAST_ROWS, _MOST_ROWS = 240, 256


class Mlp(NamedTuple):
    """Weights of a layer's."""

    gate_up: torch.Tensor
    down: torch.Tensor


class PairPass:
    """The layers of one decoder. Steps must follow each other: they share counters."""

    def __init__(self, layers: SequenceOf[DecoderLayer], mlps: SequenceOf[Mlp]) -> None:
        """`mlps`: of each of the layers."""
        self._layers = layers
        self._mlps = mlps
        self._counters = new_counters(mlps[0].down)

    @classmethod
    def of(cls, layers: SequenceOf[DecoderLayer]) -> PairPass | None:
        """None where ordinary passes are to be taken."""
        mlps = [mlp for layer in layers if (mlp := mlp_of(layer)) is not None]
        fits = len(mlps) == len(layers) and all(fits_pair_mlp(*mlp) for mlp in mlps)
        return cls(layers, mlps) if fits else None

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
        """The stream behind all layers; arguments as in `Decoder.forward`. It may take the memory
        of `residual`."""
        last = len(self._layers) - 1
        first = self._layers[0]
        x = rms_norm(residual, first.input_norm, first.eps)
        for index, (layer, mlp) in enumerate(zip(self._layers, self._mlps, strict=True)):
            query = layer.store(layer.qkv(x), batch, kv_layers[index], cos_sin, plan)
            if on_layer is not None:
                on_layer(index)
            attended = layer.attention(query, batch, kv_layers[index], plan)
            residual = layer.output.add_to(attended, residual)
            x = rms_norm(residual, layer.post_norm, layer.eps)
            parts = pair_mlp(x, *mlp, self._counters)
            if index < last:
                x = sum_rms_norm(residual, parts, self._layers[index + 1].input_norm, layer.eps)
        return add_parts(residual, parts)


def mlp_of(layer: DecoderLayer) -> Mlp | None:
    """None where its weights are kept in other ways than as plain ones of this rank alone."""
    plain = [
        matrix.weight
        for matrix in (layer.gate_up, layer.down)
        if isinstance(matrix, Linear) and matrix.bias is None
    ]
    return Mlp(*plain) if len(plain) == len(Mlp._fields) else None
