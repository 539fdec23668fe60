"""Matrices whose weights stay quantised on a GPU: the `Matrix` of 8-bit floats.

A decode step is bound by reading weights, so half the bytes take half the time; few rows are
multiplied as they are with weights widened in registers. Many rows are bound by arithmetic: they
are quantised too and multiplied by the tensor cores' 8-bit rate.

A CPU keeps no quantised weights: there they are dequantised while they are loaded, into the
model's type, and inputs are not quantised.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from engine.models.linear import Linear
from kernels.fp8_linear import fp8_linear
from kernels.rms_norm import rms_norm
from kernels.silu_mul import silu_mul
from kernels.skinny_linear import skinny_linear, skinny_rows

if TYPE_CHECKING:
    from collections.abc import Mapping

    from engine.models.linear import Matrix, MatrixFactory, MatrixSpec
    from engine.models.quantization import Quantization

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
    is plain as a whole.
    """
    make_plain = partial(Linear.empty, dtype=dtype, device=device)
    if quantization is None or not quantization.is_float8:
        return make_plain

    def make(spec: MatrixSpec) -> Matrix:
        if not plain.isdisjoint(spec.parts):
            return make_plain(spec)
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
        self._few_rows = skinny_rows(weight) if fits else _ALL_ROWS

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

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._widens(x):
            return skinny_linear(x, self.weight, weight_scale=self.weight_scale, bias=self.bias)
        return fp8_linear(
            x, self.weight, self.weight_scale, input_scale=self.input_scale, bias=self.bias
        )

    def normed(self, residual: torch.Tensor, norm_weight: torch.Tensor, eps: float) -> torch.Tensor:
        if not self._widens(residual):
            return self(rms_norm(residual, norm_weight, eps))
        return skinny_linear(
            residual,
            self.weight,
            weight_scale=self.weight_scale,
            bias=self.bias,
            norm_weight=norm_weight,
            eps=eps,
        )

    def normed_silu_mul(
        self, residual: torch.Tensor, norm_weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        if not self._widens(residual):
            return silu_mul(self.normed(residual, norm_weight, eps))
        return skinny_linear(
            residual,
            self.weight,
            weight_scale=self.weight_scale,
            bias=self.bias,
            norm_weight=norm_weight,
            eps=eps,
            silu_mul=True,
        )

    def add_to(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        if not self._widens(x):
            return self(x).add_(residual)
        return skinny_linear(
            x, self.weight, weight_scale=self.weight_scale, bias=self.bias, residual=residual
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
