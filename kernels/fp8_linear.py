"""Products in FP8: activations are quantised row by row, the matrix units multiply e4m3 by e4m3.

This is the W8A8 of FP8 checkpoints and the fast way for all but one row, where only reading the
weights counts: `skinny_linear` takes the same weights and leaves the activations as they are. Of
some dozens of rows the product is one kernel with what stands behind it, where the matrix suits it
(`thin_linear`, `thin_gated_linear`); else it is the library's.

Sums are made in the tensor cores' fast mode, whose error is a tenth of that of quantising.

Stored value = value / scale, rounded to nearest, saturated at +-448.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from kernels.dispatch import (
    chained_launch,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    next_power_of_two,
    runs_triton,
    tl,
)
from kernels.rms_norm import rms_norm
from kernels.scale_product import scale_product
from kernels.silu_mul import silu_mul as silu_mul_of
from kernels.thin_gated_linear import fits_thin_gated_linear, thin_gated_linear
from kernels.thin_linear import fits_thin_linear, thin_linear
from kernels.thin_ring import Scales

FP8 = torch.float8_e4m3fn
_MAX = 448.0
# Up to so many rows the library is much faster without a scale for each row and column; beyond, it
# is worth its while to have them inside.
_FEW_ROWS = 512
# Of rows that leave multiprocessors idle, one takes all the threads that there can be.
_LONE_ROWS = 128
# Rows of zeros get this scale instead of 0.
_MIN_SCALE = 1e-12


def quantize_rows(
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[M, K]` -> (float8_e4m3fn `[M, K]`, float32 `[M, 1]`).

    scale: a static one, float32 `[1]`, for all rows; None takes each row's largest magnitude / 448.
    x's rows may be strided. norm_weight: `[K]`, quantises `rms_norm(x, norm_weight, eps)` instead,
    which is not rounded to x's dtype in between.
    """
    assert x.dim() == 2
    assert x.stride(1) == 1
    if runs_triton(x):
        return _quantize_rows_triton(x, scale, norm_weight, eps)
    if norm_weight is not None:
        x = rms_norm(x.float(), norm_weight.float(), eps)
    return _quantize_rows_reference(x, scale)


def _quantize_rows_reference(
    x: torch.Tensor, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x.float()
    if scale is None:
        scales = wide.abs().amax(1, keepdim=True).div_(_MAX).clamp_(min=_MIN_SCALE)
    else:
        scales = scale.float().expand(x.shape[0], 1).contiguous()
    return (wide / scales).clamp_(-_MAX, _MAX).to(FP8), scales


def quantize_weight(
    weight: torch.Tensor, *, per_channel: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[N, K]` -> (float8_e4m3fn `[N, K]`, float32 `[N]` or `[1]`). Once per matrix, at load."""
    largest = weight.abs().amax(1) if per_channel else weight.abs().amax().view(1)
    scale = largest.float().div_(_MAX).clamp_(min=_MIN_SCALE)
    quantized = (weight.float() / scale.view(-1, 1)).clamp_(-_MAX, _MAX).to(FP8)
    return quantized, scale


def fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    *,
    input_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
    silu_mul: bool = False,
    spare: torch.Tensor | None = None,
) -> torch.Tensor:
    """`act(norm(x) @ (weight * weight_scale).T + bias) + residual` with `norm(x)` quantised, in x's
    dtype; norm_weight, residual and silu_mul as in `skinny_linear`. The result may take the memory
    of residual.

    x: `[M, K]`. weight: float8_e4m3fn `[N, K]`, N and K multiples of 16. weight_scale: float32
    `[N]` or `[1]`. input_scale: static, float32 `[1]`; None quantises every row by its own largest
    value. spare: `[M, N]` in x's dtype, contiguous: memory for the product, taken where that is
    free. On a GPU the first call must not be captured in a graph.
    """
    assert weight.dtype == FP8
    quantized, scales = quantize_rows(x, input_scale, norm_weight=norm_weight, eps=eps)
    both = Scales(scales, weight_scale)
    if silu_mul and _fits_thin_gated(x, weight, both, bias, residual):
        return thin_gated_linear(quantized, weight, scales=both, dtype=x.dtype)
    if not silu_mul and _fits_thin(x, weight, both):
        return thin_linear(
            quantized, weight, scales=both, bias=bias, residual=residual, dtype=x.dtype
        )
    if x.dtype == torch.bfloat16 and x.shape[0] > _FEW_ROWS and _library_scales(x.device):
        y = _scaled_by_library(quantized, scales, weight, weight_scale, bias, spare)
        if silu_mul:
            y = silu_mul_of(y)
        return y if residual is None else residual.add_(y)
    return scale_product(
        _product(quantized, weight, x.dtype), scales, weight_scale, x.dtype,
        bias=bias, residual=residual, silu_mul=silu_mul,
    )  # fmt: skip


def _fits_thin(x: torch.Tensor, weight: torch.Tensor, scales: Scales) -> bool:
    """Whether the product and what stands behind it are one kernel."""
    by_row = scales.weights.numel() == weight.shape[0]
    return by_row and fits_thin_linear(x.shape[0], weight)


def _fits_thin_gated(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: Scales,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> bool:
    """The same, with an activation and nothing else behind it."""
    by_row = scales.weights.numel() == weight.shape[0] and bias is None and residual is None
    return by_row and fits_thin_gated_linear(x.shape[0], weight)


def _product(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x @ weight.T` without scales, in bfloat16 for results in it, else in float32."""
    if not x.is_cuda or x.shape[0] == 0:
        return x.float() @ weight.float().t()
    one = _one(x.device)
    out_dtype = dtype if dtype == torch.bfloat16 else torch.float32
    return torch._scaled_mm(
        x, weight.t(), scale_a=one, scale_b=one, out_dtype=out_dtype, use_fast_accum=True
    )


def _scaled_by_library(
    x: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """With a scale per row and column, which the library knows with bfloat16 results only."""
    columns = weight_scale.view(1, -1)
    if columns.shape[1] == 1:
        columns = columns.expand(1, weight.shape[0]).contiguous()
    return torch._scaled_mm(
        x, weight.t(), scale_a=scales, scale_b=columns, bias=bias, out_dtype=torch.bfloat16,
        use_fast_accum=True, out=out,
    )  # fmt: skip


@lru_cache(maxsize=16)
def _library_scales(device: torch.device) -> bool:
    """Whether the library has products with a scale per row and column there."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


@lru_cache(maxsize=16)
def _one(device: torch.device) -> torch.Tensor:
    assert not torch.cuda.is_current_stream_capturing()
    return torch.ones((), device=device)


def _quantize_rows_triton(
    x: torch.Tensor, scale: torch.Tensor | None, norm_weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows, size = x.shape
    quantized = torch.empty(num_rows, size, dtype=FP8, device=x.device)
    scales = torch.empty(num_rows, 1, dtype=torch.float32, device=x.device)
    chained = chained_launch(x.device)
    if num_rows:
        _quantize_rows_kernel[(num_rows,)](
            x, scale, norm_weight, quantized, scales, x.stride(0), eps, MAX=_MAX,
            MIN_SCALE=_MIN_SCALE, SIZE=size, BLOCK=next_power_of_two(size), ROUNDS=not x.is_cuda,
            CHAINED=chained, num_warps=_num_warps(num_rows, size), launch_pdl=chained,
        )  # fmt: skip
    return quantized, scales


def _num_warps(num_rows: int, size: int) -> int:
    if num_rows > _LONE_ROWS:
        return 8 if size > 2048 else 4
    return min(32, max(4, next_power_of_two(size) // 256))


@jit
def _quantize_rows_kernel(
    x_ptr: tl.tensor, scale_ptr: tl.tensor, norm_ptr: tl.tensor, quantized_ptr: tl.tensor,
    scales_ptr: tl.tensor, x_stride: tl.tensor, eps: tl.tensor, MAX: tl.constexpr,
    MIN_SCALE: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, ROUNDS: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:  # fmt: skip
    """scale_ptr and norm_ptr may be None, which Triton compiles apart.

    ROUNDS: Triton's interpreter loses the carry of a mantissa that is rounded up, so it is given
    four significant bits (Veltkamp's splitting)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < SIZE
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    if norm_ptr is not None:
        weight = tl.load(norm_ptr + column, mask=mask, other=0.0).to(tl.float32)
        x = x * (1.0 / tl.sqrt_rn(tl.sum(x * x, axis=0) / SIZE + eps)) * weight
    if scale_ptr is None:
        scale = tl.maximum(tl.max(tl.abs(x), axis=0) / MAX, MIN_SCALE)
    else:
        scale = tl.load(scale_ptr)
    tl.store(scales_ptr + row, scale)
    y = tl.minimum(tl.maximum(x / scale, -MAX), MAX)
    if ROUNDS:
        shifted = y * 1048577.0
        y = shifted - (shifted - y)
    tl.store(quantized_ptr + row * SIZE + column, y.to(quantized_ptr.dtype.element_ty), mask=mask)
