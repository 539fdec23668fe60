"""Products of few rows with a large matrix, at the rate at which the matrix can be read.

A decode step multiplies one row per sequence, so its time is that of reading the weights. What
stands around the product is part of the same kernel, because each kernel of its own costs as much
as reading several megabytes:

1. The norm in front. Every program norms all of x, which is little beside its share of weights
   and happens while the first of these are on their way.
2. FP8 weights are read as such and widened in registers; their scale waits for the end.
3. bias, silu(gate) * up and the residual are added to the float32 sums before the only rounding.

The kernel is `skinny_stream`'s and needs a Hopper GPU. Elsewhere, and with many rows, where the
product is bound by arithmetic, one operation of the library follows the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear

from kernels.rms_norm import rms_norm
from kernels.silu_mul import silu_mul
from kernels.skinny_stream import MAX_ROWS, can_stream, keeps_x, stream

if TYPE_CHECKING:
    from kernels.peer_sum import PeerInboxes

_FP8 = torch.float8_e4m3fn


def skinny_rows(weight: torch.Tensor) -> int:
    """Up to how many rows `skinny_linear` has a kernel that beats the library's product.

    0: none, as on a CPU. Beyond, it composes norm, product and activation. Measured on an H200,
    FP8 against `fp8_linear`.
    """
    if not can_stream(weight.device, weight.shape[1], weight.dtype):
        return 0
    if keeps_x(weight.shape[1]):
        return MAX_ROWS
    return 2 if weight.dtype == _FP8 else 4


def skinny_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    weight_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
    silu_mul: bool = False,
    out: torch.Tensor | None = None,
    peers: PeerInboxes | None = None,
) -> torch.Tensor:
    """`act(norm(x) @ weight.T * weight_scale + bias) + residual`; all but the product is optional.

    x: `[M, K]`, rows may be strided; M may be 0. weight: `[N, K]`, contiguous, in x's dtype or
    float8_e4m3fn; then weight_scale is float32 `[N]` or `[1]`. bias: `[N]`. norm_weight: `[K]`,
    with it norm is `rms_norm(x, norm_weight, eps)`. silu_mul: act is `silu(first half) * second
    half`, so that the result has N / 2 columns. residual, out: `[M, N]` (`[M, N / 2]`), contiguous,
    in x's dtype; out may be residual, but neither may be x. peers: out is the sum over all
    ranks, who make the same call with their columns of the matrix; for 1 to `skinny_rows` rows.
    Returns out.
    """
    assert x.dim() == weight.dim() == 2
    assert x.shape[1] == weight.shape[1]
    assert x.stride(1) == 1
    assert weight.is_contiguous()
    assert (weight.dtype == _FP8) == (weight_scale is not None)
    out_size = weight.shape[0] // 2 if silu_mul else weight.shape[0]
    if out is None:
        out = torch.empty(x.shape[0], out_size, dtype=x.dtype, device=x.device)
    assert out.is_contiguous()
    assert residual is None or residual.is_contiguous()
    if x.shape[0] == 0:
        return out
    if x.shape[0] > skinny_rows(weight) or x.itemsize > 2:
        assert peers is None
        return _composed(x, weight, weight_scale, bias, norm_weight, eps, residual, silu_mul, out)
    stream(
        x, weight, out, weight_scale=weight_scale, bias=bias, norm_weight=norm_weight, eps=eps,
        residual=residual, gated=silu_mul, peers=peers,
    )  # fmt: skip
    return out


def _composed(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    gated: bool,
    out: torch.Tensor,
) -> torch.Tensor:
    """The reference: one operation after the other."""
    if norm_weight is not None:
        x = rms_norm(x, norm_weight, eps)
    if weight_scale is not None:
        weight = (weight.float() * weight_scale.view(-1, 1)).to(x.dtype)
    if residual is not None and bias is None and not gated:
        return torch.addmm(residual, x, weight.t(), out=out)
    y = linear(x, weight, bias)
    if gated:
        y = silu_mul(y)
    return out.copy_(y) if residual is None else torch.add(y, residual, out=out)
