"""The memory that weights are loaded into: views by name, as a model hands them out.

A view is named `<module>.<kind>`, the module as in the checkpoint. Beside `weight` and `bias` of
plain floats there are, whatever the layout of the checkpoint,

    weight, weight_scale, input_scale    float8 `[out, in]`, float32 `[out]`, float32 `[1]`
    qweight, scales, zeros, order        uint8 `[out, in / 2]`, floats and uint8 `[out, groups]`,
                                         int64 `[in]`: which input each column is for
    k_scale, v_scale                     float32 `[num_kv_heads]` of a layer's `self_attn`

so that a part of a model is rows or columns of its views.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from engine.quantized_tensors import Int4Weights, dequantized, to_float8, to_int4
from engine.stored_matrices import bad

if TYPE_CHECKING:
    from collections.abc import Mapping

    from engine.quantized_tensors import Weights
    from engine.tensor_parallel.shard import Shard

# Module -> kind -> memory to fill.
Modules = dict[str, dict[str, torch.Tensor]]


def by_module(views: Mapping[str, torch.Tensor]) -> Modules:
    modules: Modules = {}
    for name, view in views.items():
        module, _, kind = name.rpartition(".")
        modules.setdefault(module, {})[kind] = view
    return modules


def matrix_shape(kinds: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    """(out_size, in_size) of the matrix that these views hold; of a vector its length alone."""
    if "qweight" in kinds:
        out_size, num_bytes_of_row = kinds["qweight"].shape
        return out_size, 2 * num_bytes_of_row
    return tuple(kinds["weight"].shape)


def is_quantized(kinds: Mapping[str, torch.Tensor]) -> bool:
    return "weight_scale" in kinds or "qweight" in kinds


def fill_weights(
    module: str, kinds: Mapping[str, torch.Tensor], weights: Weights, shard: Shard
) -> int:
    """Put the shard's part of a matrix into the views of its module, as what they hold; returns
    the bytes filled."""

    def put(**values: torch.Tensor) -> int:
        return sum(
            fill(kinds[kind], cut(f"{module}.{kind}", each, shard)) for kind, each in values.items()
        )

    if "weight_scale" in kinds:
        float8 = to_float8(weights)
        filled = put(weight=float8.values, weight_scale=float8.scales)
        if "input_scale" in kinds and float8.input_scale is not None:
            filled += put(input_scale=float8.input_scale)
        return filled
    if "qweight" not in kinds:
        return put(weight=dequantized(weights))
    group_size = matrix_shape(kinds)[1] // kinds["scales"].shape[1]
    int4, order = _in_runs(to_int4(weights, group_size))
    if order is None:
        order = torch.arange(matrix_shape(kinds)[1], device=kinds["order"].device)
    elif shard.cut_dim(f"{module}.qweight") == 1:
        raise bad(f"{module} has groups in order of activation, which ranks cannot share")
    filled = put(qweight=int4.packed(), scales=int4.scales, zeros=int4.zeros)
    return filled + fill(kinds["order"], order)


def _in_runs(int4: Int4Weights) -> tuple[Int4Weights, torch.Tensor | None]:
    """Inputs in an order in which groups are runs, and which that is; None: as they come."""
    if int4.groups is None:
        return int4, None
    order = torch.argsort(int4.groups, stable=True)
    return Int4Weights(int4.codes[:, order], int4.scales, int4.zeros), order


def cut(name: str, values: torch.Tensor, shard: Shard) -> torch.Tensor:
    """What the shard has of the whole values of a view."""
    dim = shard.cut_dim(name)
    return values if dim is None else values.narrow(dim, *shard.range_of(values.shape[dim]))


def fill(view: torch.Tensor, values: torch.Tensor) -> int:
    """Returns the bytes filled."""
    view.copy_(values)
    return num_bytes(view)


def num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
