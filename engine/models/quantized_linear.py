"""Matrices whose weights stay quantised on a GPU: 8-bit floats and 4-bit integers.

A decode step is bound by reading weights, so half the bytes take half the time. Inputs of 8-bit
weights are quantised, too, and multiplied at the tensor cores' 8-bit rate; only where a kernel that
widens weights in registers is faster, with very few rows, they stay what they are. 4-bit weights
are widened: in registers for few rows, for many into memory first.

A CPU keeps no quantised weights: there they are dequantised while they are loaded, into the
model's type, and inputs are not quantised.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from cluster.errors import ConfigError
from engine.models.linear import Linear
from kernels.fp8_linear import fp8_linear
from kernels.int4_linear import int4_linear
from kernels.int4_packing import TILE_IN, TILE_OUT, Int4Weight, pack_codes
from kernels.skinny_linear import skinny_linear
from kernels.skinny_stream import can_stream

if TYPE_CHECKING:
    from collections.abc import Mapping

    from engine.models.linear import Matrix, MatrixFactory, MatrixSpec
    from engine.models.quantization import Quantization

# Rows up to which widening 8-bit weights in registers is the faster way, where they are streamed.
_STREAMED_ROWS = 1
_ALL_ROWS = 1 << 62


def matrix_factory(
    quantization: Quantization | None,
    plain: frozenset[str],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> MatrixFactory:
    """Builds what keeps a model's matrices as `quantization` says; None: as plain floats.

    `plain`: modules that the checkpoint has left as plain floats. A matrix that has such a part
    is plain as a whole; so is one of a shape that no 4-bit kernel takes.
    """
    make_plain = partial(Linear.empty, dtype=dtype, device=device)
    if quantization is None:
        return make_plain

    def make(spec: MatrixSpec) -> Matrix:
        if not plain.isdisjoint(spec.parts):
            return make_plain(spec)
        if quantization.stores_int4:
            group_size = quantization.group_size or spec.in_size
            if not Int4Linear.fits(spec, group_size):
                return make_plain(spec)
            return Int4Linear.empty(spec, group_size, dtype=dtype, device=device)
        return Float8Linear.empty(
            spec, has_input_scale=quantization.static_activations, dtype=dtype, device=device
        )

    return make


class Float8Linear:
    """The `Matrix` of float8_e4m3fn weights with a scale for each row.

    `input_scale`: float32 `[1]`, what the checkpoint divides inputs by before they become float8;
    None where that is found out from the inputs.
    """

    __slots__ = (
        "_few_rows",
        "_input_scales",
        "_parts",
        "bias",
        "input_scale",
        "weight",
        "weight_scale",
    )

    def __init__(
        self,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None,
        parts: Mapping[str, int],
        input_scales: torch.Tensor | None = None,
    ) -> None:
        """`weight` `[out_size, in_size]`, `weight_scale` float32 `[out_size]`, `bias`
        `[out_size]`, `input_scales` float32, one for each part."""
        self.weight = weight
        self.weight_scale = weight_scale
        self.bias = bias
        self.input_scale: torch.Tensor | None = None
        self._parts = parts
        self._input_scales = input_scales
        # The tensor cores take 8-bit matrices of multiples of 16 only.
        fits = weight.shape[0] % 16 == 0 and weight.shape[1] % 16 == 0
        streams = can_stream(weight.device, weight.shape[1], weight.dtype)
        self._few_rows = (_STREAMED_ROWS if streams else 0) if fits else _ALL_ROWS

    @classmethod
    def empty(
        cls, spec: MatrixSpec, *, has_input_scale: bool, dtype: torch.dtype, device: torch.device
    ) -> Float8Linear:
        def vector(size: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        shape = (spec.out_size, spec.in_size)
        return cls(
            torch.empty(shape, dtype=torch.float8_e4m3fn, device=device),
            vector(spec.out_size, torch.float32),
            vector(spec.out_size, dtype) if spec.bias else None,
            spec.parts,
            vector(len(spec.parts), torch.float32) if has_input_scale else None,
        )

    def __call__(self, x: torch.Tensor, spare: torch.Tensor | None = None) -> torch.Tensor:
        return self._product(x, spare)

    def normed(self, residual: torch.Tensor, norm_weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self._product(residual, norm_weight=norm_weight, eps=eps)

    def normed_silu_mul(
        self, residual: torch.Tensor, norm_weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        return self._product(residual, norm_weight=norm_weight, eps=eps, silu_mul=True)

    def add_to(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self._product(x, residual=residual)

    def _product(
        self, x: torch.Tensor, spare: torch.Tensor | None = None, **options: Any
    ) -> torch.Tensor:
        """`options`: what belongs to the product, named alike by both kernels."""
        if self._widens(x):
            return skinny_linear(
                x, self.weight, weight_scale=self.weight_scale, bias=self.bias, **options
            )
        return fp8_linear(
            x,
            self.weight,
            self.weight_scale,
            input_scale=self.input_scale,
            bias=self.bias,
            spare=spare,
            **options,
        )

    def _widens(self, x: torch.Tensor) -> bool:
        """Whether inputs stay what they are, and weights are widened to meet them."""
        return x.shape[0] <= self._few_rows

    def checkpoint_views(self) -> dict[str, torch.Tensor]:
        views: dict[str, torch.Tensor] = {}
        begin = 0
        for index, (name, size) in enumerate(self._parts.items()):
            end = begin + size
            views[f"{name}.weight"] = self.weight[begin:end]
            views[f"{name}.weight_scale"] = self.weight_scale[begin:end]
            if self.bias is not None:
                views[f"{name}.bias"] = self.bias[begin:end]
            if self._input_scales is not None:
                views[f"{name}.input_scale"] = self._input_scales[index : index + 1]
            begin = end
        return views

    def pack(self) -> None:
        """One input feeds all parts: the largest scale is the one under which none overflows."""
        if self._input_scales is not None:
            self.input_scale = self._input_scales.amax(dim=0, keepdim=True)


class Int4Linear:
    """The `Matrix` of 4-bit integers with a scale and a zero for each group of inputs.

    The loader fills `qweight`, `scales`, `zeros` and `order` as `engine/weight_views.py` has them;
    `pack` makes of them what the kernel reads, under the same names.
    """

    __slots__ = ("_group_size", "_parts", "bias", "order", "qweight", "scales", "zeros")

    def __init__(
        self,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor,
        order: torch.Tensor,
        bias: torch.Tensor | None,
        parts: Mapping[str, int],
    ) -> None:
        """`qweight` uint8 `[out_size, in_size / 2]`, `scales` in the model's type and `zeros`
        uint8 `[out_size, groups]`, `order` int64 `[parts, in_size]`, `bias` `[out_size]`."""
        self.qweight = qweight
        self.scales = scales
        self.zeros = zeros
        self.order: torch.Tensor | None = order
        self.bias = bias
        self._parts = parts
        self._group_size = order.shape[1] // scales.shape[1]

    @classmethod
    def fits(cls, spec: MatrixSpec, group_size: int) -> bool:
        """Whether the kernel has a layout for such a matrix."""
        tiles = spec.out_size % TILE_OUT == 0 and spec.in_size % TILE_IN == 0
        groups = group_size == 32 or group_size % TILE_IN == 0
        return tiles and groups and spec.in_size % group_size == 0

    @classmethod
    def empty(
        cls, spec: MatrixSpec, group_size: int, *, dtype: torch.dtype, device: torch.device
    ) -> Int4Linear:
        def tensor(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(rows, columns, dtype=dtype, device=device)

        num_groups = spec.in_size // group_size
        return cls(
            tensor(spec.out_size, spec.in_size // 2, torch.uint8),
            tensor(spec.out_size, num_groups, dtype),
            tensor(spec.out_size, num_groups, torch.uint8),
            tensor(len(spec.parts), spec.in_size, torch.int64),
            torch.empty(spec.out_size, dtype=dtype, device=device) if spec.bias else None,
            spec.parts,
        )

    def __call__(self, x: torch.Tensor, spare: torch.Tensor | None = None) -> torch.Tensor:
        return int4_linear(x, self._weight(), bias=self.bias)

    def normed(self, residual: torch.Tensor, norm_weight: torch.Tensor, eps: float) -> torch.Tensor:
        return int4_linear(
            residual, self._weight(), bias=self.bias, norm_weight=norm_weight, eps=eps
        )

    def normed_silu_mul(
        self, residual: torch.Tensor, norm_weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        return int4_linear(
            residual,
            self._weight(),
            bias=self.bias,
            norm_weight=norm_weight,
            eps=eps,
            silu_mul=True,
        )

    def add_to(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return int4_linear(x, self._weight(), bias=self.bias, residual=residual)

    def checkpoint_views(self) -> dict[str, torch.Tensor]:
        views: dict[str, torch.Tensor] = {}
        begin = 0
        for index, (name, size) in enumerate(self._parts.items()):
            end = begin + size
            views[f"{name}.qweight"] = self.qweight[begin:end]
            views[f"{name}.scales"] = self.scales[begin:end]
            views[f"{name}.zeros"] = self.zeros[begin:end]
            if self.order is not None:
                views[f"{name}.order"] = self.order[index]
            if self.bias is not None:
                views[f"{name}.bias"] = self.bias[begin:end]
            begin = end
        return views

    def pack(self) -> None:
        """Raises `ConfigError` when the parts want their common input in different orders."""
        low, high = self.qweight & 15, self.qweight >> 4
        codes = torch.stack((low, high), dim=2).flatten(1)
        packed = pack_codes(codes, self.scales.t(), self.zeros.t(), dtype=self.scales.dtype)
        self.qweight, self.scales, self.zeros = packed.codes, packed.scales, packed.zeros
        self.order = self._common_order()

    def _common_order(self) -> torch.Tensor | None:
        """int64 `[in_size]`; None when inputs come in the order of the columns."""
        orders = self.order
        if orders is None or torch.equal(
            orders, torch.arange(orders.shape[1], device=orders.device).expand_as(orders)
        ):
            return None
        if not (orders == orders[0]).all():
            raise ConfigError(
                f"{', '.join(self._parts)} order one input by activation in different ways, which "
                f"is only computed on a CPU.",
                param="model",
            )
        return orders[0].clone()

    def _weight(self) -> Int4Weight:
        return Int4Weight(self.qweight, self.scales, self.zeros, self._group_size, self.order)
