"""One matrix of weights, and the fastest way this device has to multiply by it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear

if TYPE_CHECKING:
    from collections.abc import Callable

# Rows for which a packed layout is chosen. 16 or more gives the layout that is fast from two
# rows up to whole prompts; 1 would choose one that is slow at everything else.
_PACKED_FOR_ROWS = 16

# The overload itself: resolving it at each call costs as much as a small matrix.
_linear_packed: Callable[..., torch.Tensor] = (
    torch.ops.mkldnn._linear_pointwise.default if torch._C._has_mkldnn else linear
)


class Linear:
    """`y = x @ weight.T + bias` for x `[num_tokens, in_size]`.

    1. Built empty; the loader fills `weight` and `bias` in place, by slices where several
       checkpoint tensors make up one matrix.
    2. `pack()`, once filled: on a CPU the weights move into oneDNN's blocked layout (2 to 3
       times faster than the plain one at 16 rows) and `weight` is given up.
    """

    __slots__ = ("_packed", "bias", "weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """`weight` `[out_size, in_size]`, `bias` `[out_size]`."""
        self.weight = weight
        self.bias = bias
        self._packed: torch.Tensor | None = None

    @classmethod
    def empty(
        cls, out_size: int, in_size: int, *, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> Linear:
        return cls(
            torch.empty(out_size, in_size, dtype=dtype, device=device),
            torch.empty(out_size, dtype=dtype, device=device) if bias else None,
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        packed = self._packed
        if packed is None:
            return linear(x, self.weight, self.bias)
        return _linear_packed(x, packed, self.bias, "none", [], "")

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
