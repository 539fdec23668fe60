"""Products of few rows with a large matrix, at the rate at which the matrix can be read.

A decode step multiplies one row per sequence, so its time is that of reading the weights. What
stands around the product is part of the same kernel, because each kernel of its own costs as much
as reading several megabytes:

1. The norm in front. `rms_norm(x) @ W.T = (x * norm_weight) @ W.T / rms(x)`: the sum of squares is
   gathered while x is walked anyhow, and the division waits for the end.
2. FP8 weights are read as such and widened in registers; their scale waits for the end too.
3. bias, silu(gate) * up and the residual are added to the float32 sums before the only rounding.

On Hopper the kernel is `skinny_stream`'s; the one here is for other GPUs. With many rows the
product is bound by arithmetic, and the library's own is called.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from kernels.dispatch import jit_for_any, next_power_of_two, num_multiprocessors, runs_triton, tl
from kernels.rms_norm import rms_norm
from kernels.silu_mul import silu_mul
from kernels.skinny_stream import MAX_ROWS as MAX_STREAMED
from kernels.skinny_stream import can_stream, keeps_x, stream

_FP8 = torch.float8_e4m3fn
_MAX_ROWS = 16


def skinny_rows(weight: torch.Tensor) -> int:
    """Up to how many rows `skinny_linear` has a kernel that beats the library's product.

    0: none, as on a CPU. Beyond, it composes norm, product and activation.
    """
    in_size = weight.shape[1]
    if not runs_triton(weight) or in_size % 16:
        return 0
    streamed = can_stream(weight.device, in_size, weight.dtype)
    if weight.dtype == _FP8 or not weight.is_cuda:
        return MAX_STREAMED if streamed else _MAX_ROWS
    # Plain weights: a kernel that is not streamed beats the library nowhere.
    if not streamed:
        return 0
    return MAX_STREAMED if keeps_x(in_size) else MAX_STREAMED // 2


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
) -> torch.Tensor:
    """`act(norm(x) @ weight.T * weight_scale + bias) + residual`; all but the product is optional.

    x: `[M, K]`, rows may be strided; M may be 0. weight: `[N, K]`, contiguous, in x's dtype or
    float8_e4m3fn; then weight_scale is float32 `[N]` or `[1]`. bias: `[N]`. norm_weight: `[K]`,
    with it norm is `rms_norm(x, norm_weight, eps)`. silu_mul: act is `silu(first half) * second
    half`, so that the result has N / 2 columns. residual, out: `[M, N]` (`[M, N / 2]`), contiguous,
    in x's dtype; out may be residual, but neither may be x. Returns out.
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
    if x.shape[0] > skinny_rows(weight):
        return _composed(x, weight, weight_scale, bias, norm_weight, eps, residual, silu_mul, out)
    if can_stream(x.device, x.shape[1], weight.dtype):
        stream(
            x, weight, out, weight_scale=weight_scale, bias=bias, norm_weight=norm_weight, eps=eps,
            residual=residual, gated=silu_mul,
        )  # fmt: skip
    else:
        _skinny_triton(x, weight, weight_scale, bias, norm_weight, eps, residual, silu_mul, out)
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
    """The reference, and what runs for many rows: one operation after the other."""
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


def _skinny_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    gated: bool,
    out: torch.Tensor,
) -> None:
    num_rows, in_size = x.shape
    out_size = out.shape[1]
    # Small tiles until every multiprocessor has two.
    block_out = 16 if out_size < 64 * num_multiprocessors(x.device) else 32
    scale_stride = 0 if weight_scale is None or weight_scale.numel() == 1 else 1
    _skinny_kernel[(-(-out_size // block_out),)](
        x, weight, weight_scale, bias, norm_weight, residual, out,
        num_rows, x.stride(0), scale_stride, eps,
        OUT=out_size, IN=in_size, BLOCK_ROWS=16, BLOCK_OUT=block_out,
        BLOCK_IN=min(256, next_power_of_two(in_size)), GATED=gated, num_warps=4, num_stages=4,
    )  # fmt: skip


@jit_for_any("num_rows")
def _skinny_kernel(
    x_ptr: tl.tensor, weight_ptr: tl.tensor, scale_ptr: tl.tensor, bias_ptr: tl.tensor,
    norm_ptr: tl.tensor, residual_ptr: tl.tensor, out_ptr: tl.tensor, num_rows: tl.tensor,
    x_stride: tl.tensor, scale_stride: tl.tensor, eps: tl.tensor, OUT: tl.constexpr,
    IN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    GATED: tl.constexpr,
) -> None:  # fmt: skip
    """Optional pointers are None, which Triton compiles apart."""
    column = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    place = tl.arange(0, BLOCK_IN)
    row = tl.arange(0, BLOCK_ROWS)
    weight_tile = weight_ptr + tl.minimum(column, OUT - 1).to(tl.int64)[:, None] * IN
    x_tile = x_ptr + row.to(tl.int64)[None, :] * x_stride
    row_mask = row[None, :] < num_rows
    total = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
    total_up = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
    squares = tl.zeros((BLOCK_IN, BLOCK_ROWS), tl.float32)
    for first in range(0, IN, BLOCK_IN):
        k = first + place
        inside = k < IN
        x = tl.load(x_tile + k[:, None], mask=row_mask & inside[:, None], other=0.0)
        if norm_ptr is not None:
            wide = x.to(tl.float32)
            squares += wide * wide
            factor = tl.load(norm_ptr + k, mask=inside, other=0.0).to(tl.float32)
            x = (wide * factor[:, None]).to(x.dtype)
        weight = tl.load(weight_tile + k[None, :], mask=inside[None, :], other=0.0)
        total = tl.dot(weight.to(x.dtype), x, total, input_precision="ieee")
        if GATED:
            up = tl.load(weight_tile + OUT * IN + k[None, :], mask=inside[None, :], other=0.0)
            total_up = tl.dot(up.to(x.dtype), x, total_up, input_precision="ieee")
    mask = (column < OUT)[:, None] & row_mask
    if norm_ptr is not None:
        scale = 1.0 / tl.sqrt_rn(tl.sum(squares, axis=0) / IN + eps)
        total *= scale[None, :]
        total_up *= scale[None, :]
    total = _scaled(total, scale_ptr, scale_stride, bias_ptr, column, OUT)
    if GATED:
        total_up = _scaled(total_up, scale_ptr, scale_stride, bias_ptr, column + OUT, 2 * OUT)
        total = total / (1.0 + tl.exp(-total)) * total_up
    place_out = row.to(tl.int64)[None, :] * OUT + column[:, None]
    if residual_ptr is not None:
        total += tl.load(residual_ptr + place_out, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + place_out, total.to(out_ptr.dtype.element_ty), mask=mask)


@jit_for_any()
def _scaled(
    total: tl.tensor, scale_ptr: tl.tensor, scale_stride: tl.tensor, bias_ptr: tl.tensor,
    column: tl.tensor, OUT: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + column * scale_stride, mask=column < OUT, other=0.0)
        total *= scale[:, None]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=column < OUT, other=0.0).to(tl.float32)
        total += bias[:, None]
    return total
