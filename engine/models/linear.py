"""A matrix of weights, and the fastest way this device has to multiply by it.

A decoder is a residual stream that passes through four matrices per layer. What stands before
or behind a product belongs to it, so that it can be one kernel: the norm before (`normed`), the
gated activation behind (`normed_silu_mul`), the sum with the stream (`add_to`).

Life of a matrix
    1. A `MatrixFactory` builds it empty from its `MatrixSpec`.
    2. The loader fills the views that `checkpoint_views` names, which is the merge of several
       matrices of the checkpoint into one.
    3. `pack` gives it its fastest layout; the views are void from now on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch.nn.functional import linear

from kernels.gated_linear import fits_gated_linear, gated_linear
from kernels.rms_norm import rms_norm
from kernels.silu_mul import silu_mul
from kernels.skinny_linear import skinny_linear, skinny_rows
from kernels.thin_gated_linear import fits_thin_gated_linear, thin_gated_linear
from kernels.thin_linear import fits_thin_linear, thin_linear

if TYPE_CHECKING:
    from kernels.peer_sum import PeerInboxes

# Rows for which a packed layout is chosen. 16 or more gives the layout that is fast from two
# rows up to whole prompts; 1 would choose one that is slow at everything else.
_PACKED_FOR_ROWS = 16

# The overload itself: resolving it at each call costs as much as a small matrix.
_linear_packed: Callable[..., torch.Tensor] = (
    torch.ops.mkldnn._linear_pointwise.default if torch._C._has_mkldnn else linear
)


class MatrixSpec(NamedTuple):
    """What is known of a matrix before it exists.

    `parts`: the matrices of the checkpoint that are stacked into this one, from the first row
    on: their names (without ".weight") and numbers of rows.
    """

    parts: Mapping[str, int]
    in_size: int
    bias: bool

    @property
    def out_size(self) -> int:
        return sum(self.parts.values())


class Matrix(Protocol):
    """`y = x @ weight.T + bias` for x `[num_rows, in_size]`, and what belongs to the product.

    `residual` is the stream: `[num_rows, hidden_size]`, contiguous, in the model's type, as are
    the results.
    """

    def __call__(self, x: torch.Tensor, spare: torch.Tensor | None = None) -> torch.Tensor:
        """`[num_rows, out_size]`. `spare`: memory for it, taken where that saves a copy."""

    def normed(self, residual: torch.Tensor, norm_weight: torch.Tensor, eps: float) -> torch.Tensor:
        """The product with `rms_norm(residual)`: `[num_rows, out_size]`."""

    def normed_silu_mul(
        self, residual: torch.Tensor, norm_weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """`silu(gate) * up` of `normed`, gate being its first half: `[num_rows, out_size / 2]`."""

    def add_to(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """`residual + y`. It may take the memory of `residual`: use only the result."""

    def checkpoint_views(self) -> dict[str, torch.Tensor]:
        """Name in the checkpoint -> memory to fill."""

    def pack(self) -> None:
        """Once, after the views are filled."""


MatrixFactory = Callable[[MatrixSpec], Matrix]


class Linear:
    """The `Matrix` of plain weights.

    On a GPU few rows take the kernel whose time is that of reading the weights, with what belongs
    to the product inside; so do some dozens, but for the norm, where kernels for them suit the
    matrix. Many rows take the library's, and a prompt's activation is part of the product. On a CPU
    `pack` moves the weights into oneDNN's blocked layout, 2 to 3 times faster than the plain one at
    16 rows, and `weight` is given up.
    """

    __slots__ = ("_few_rows", "_packed", "_parts", "bias", "weight")

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        parts: Mapping[str, int] | None = None,
    ) -> None:
        """`weight` `[out_size, in_size]`, `bias` `[out_size]`. `parts`: as in `MatrixSpec`."""
        self.weight = weight
        self.bias = bias
        self._parts = parts or {}
        self._packed: torch.Tensor | None = None
        self._few_rows = skinny_rows(weight) if weight.is_cuda else 0

    @classmethod
    def empty(cls, spec: MatrixSpec, *, dtype: torch.dtype, device: torch.device) -> Linear:
        return cls(
            torch.empty(spec.out_size, spec.in_size, dtype=dtype, device=device),
            torch.empty(spec.out_size, dtype=dtype, device=device) if spec.bias else None,
            spec.parts,
        )

    def __call__(self, x: torch.Tensor, spare: torch.Tensor | None = None) -> torch.Tensor:
        packed = self._packed
        if packed is None:
            if x.shape[0] <= self._few_rows:
                return skinny_linear(x, self.weight, bias=self.bias)
            if self.bias is None and fits_thin_linear(x.shape[0], self.weight):
                return thin_linear(x, self.weight)
            if self.bias is None and spare is not None:
                return torch.mm(x, self.weight.t(), out=spare)
            return linear(x, self.weight, self.bias)
        return _linear_packed(x, packed, self.bias, "none", [], "")

    def normed(self, residual: torch.Tensor, norm_weight: torch.Tensor, eps: float) -> torch.Tensor:
        if residual.shape[0] <= self._few_rows:
            return skinny_linear(
                residual, self.weight, bias=self.bias, norm_weight=norm_weight, eps=eps,
            )  # fmt: skip
        return self(rms_norm(residual, norm_weight, eps))

    def normed_silu_mul(
        self, residual: torch.Tensor, norm_weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        if residual.shape[0] <= self._few_rows:
            return skinny_linear(
                residual,
                self.weight,
                bias=self.bias,
                norm_weight=norm_weight,
                eps=eps,
                silu_mul=True,
            )
        x = rms_norm(residual, norm_weight, eps)
        if self.bias is None:
            if fits_thin_gated_linear(len(x), self.weight):
                return thin_gated_linear(x, self.weight)
            if fits_gated_linear(len(x), self.weight):
                return gated_linear(x, self.weight)
        return silu_mul(self(x))

    def add_to(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        if self._packed is not None:
            return self(x).add_(residual)
        if x.shape[0] <= self._few_rows:
            return skinny_linear(x, self.weight, bias=self.bias, residual=residual)
        if self.bias is not None:
            residual += self.bias
        if fits_thin_linear(x.shape[0], self.weight):
            return thin_linear(x, self.weight, residual=residual)
        # The sum is made before the product is rounded, and nothing else is read or written.
        return residual.addmm_(x, self.weight.t())

    def summed(
        self, x: torch.Tensor, residual: torch.Tensor | None, peers: PeerInboxes
    ) -> torch.Tensor | None:
        """`add_to` summed over ranks, all of which ask for it; None where no kernel does both."""
        if self._packed is not None or x.shape[0] > self._few_rows:
            return None
        return skinny_linear(x, self.weight, bias=self.bias, residual=residual, peers=peers)

    def checkpoint_views(self) -> dict[str, torch.Tensor]:
        views: dict[str, torch.Tensor] = {}
        begin = 0
        for name, size in self._parts.items():
            views[f"{name}.weight"] = self.weight[begin : begin + size]
            if self.bias is not None:
                views[f"{name}.bias"] = self.bias[begin : begin + size]
            begin += size
        return views

    def pack(self, *, keep_weight: bool = False) -> None:
        """`keep_weight`: the plain matrix is still needed elsewhere (tied embeddings)."""
        if not can_pack(self.weight.dtype, self.weight.device):
            return
        self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, _PACKED_FOR_ROWS)
        if not keep_weight:
            self.weight = self.weight.new_empty(0)


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    if device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if dtype == torch.float32:
        return True
    return dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
