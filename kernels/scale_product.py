"""What stands behind a product of 8-bit matrices: scales, bias, activation and residual, in one
pass over the sums.

A library multiplies with one scale for a whole matrix about twice as fast as with one for each row
and column while the weights, not the arithmetic, take the time. So it is given no scales, and they
meet the sums here, together with what would read those again anyhow.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.dispatch import chained_launch, gdc_launch_dependents, gdc_wait, jit, runs_triton, tl

_BLOCK = 1024


def scale_product(
    product: torch.Tensor,
    row_scales: torch.Tensor,
    column_scales: torch.Tensor,
    dtype: torch.dtype,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    silu_mul: bool = False,
) -> torch.Tensor:
    """`act(product * row_scales * column_scales + bias) + residual` in `dtype`, contiguous.

    product: `[M, N]`, contiguous, any float. row_scales: float32 `[M, 1]`. column_scales: float32
    `[N]` or `[1]`. bias: `[N]`. silu_mul: act is `silu(first half) * second half`, so that the
    result has N / 2 columns. residual: `[M, N]` (`[M, N / 2]`), contiguous. Computed in float32.
    """
    assert product.is_contiguous()
    assert row_scales.shape == (product.shape[0], 1)
    assert column_scales.numel() in (1, product.shape[1])
    assert residual is None or residual.is_contiguous()
    if runs_triton(product):
        return _scale_product_triton(
            product, row_scales, column_scales, dtype, bias, residual, silu_mul
        )
    y = product.float() * row_scales * column_scales.view(1, -1)
    if bias is not None:
        y += bias.float()
    if silu_mul:
        gate, up = y.chunk(2, dim=1)
        y = F.silu(gate) * up
    return (y if residual is None else y + residual.float()).to(dtype)


def _scale_product_triton(
    product: torch.Tensor,
    row_scales: torch.Tensor,
    column_scales: torch.Tensor,
    dtype: torch.dtype,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gated: bool,
) -> torch.Tensor:
    num_rows, size = product.shape
    out_size = size // 2 if gated else size
    out = torch.empty(num_rows, out_size, dtype=dtype, device=product.device)
    chained = chained_launch(product.device)
    if num_rows:
        _scale_product_kernel[(-(-out_size // _BLOCK), num_rows)](
            product, row_scales, column_scales, bias, residual, out,
            SIZE=out_size, COLUMN_STRIDE=0 if column_scales.numel() == 1 else 1, GATED=gated,
            BLOCK=_BLOCK, CHAINED=chained, num_warps=4, launch_pdl=chained,
        )  # fmt: skip
    return out


@jit
def _scale_product_kernel(
    product_ptr: tl.tensor, rows_ptr: tl.tensor, columns_ptr: tl.tensor, bias_ptr: tl.tensor,
    residual_ptr: tl.tensor, out_ptr: tl.tensor, SIZE: tl.constexpr, COLUMN_STRIDE: tl.constexpr,
    GATED: tl.constexpr, BLOCK: tl.constexpr, CHAINED: tl.constexpr,
) -> None:  # fmt: skip
    """SIZE: columns of the result. bias_ptr and residual_ptr may be None."""
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = column < SIZE
    scale = tl.load(columns_ptr + column * COLUMN_STRIDE, mask=mask, other=0.0)
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    row_scale = tl.load(rows_ptr + row)
    WIDTH: tl.constexpr = 2 * SIZE if GATED else SIZE
    product_row = product_ptr + row * WIDTH
    y = tl.load(product_row + column, mask=mask, other=0.0).to(tl.float32) * row_scale * scale
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        scale = tl.load(columns_ptr + (SIZE + column) * COLUMN_STRIDE, mask=mask, other=0.0)
        up = tl.load(product_row + SIZE + column, mask=mask, other=0.0).to(tl.float32)
        up = up * row_scale * scale
        if bias_ptr is not None:
            up += tl.load(bias_ptr + SIZE + column, mask=mask, other=0.0).to(tl.float32)
        y = y / (1.0 + tl.exp(-y)) * up
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * SIZE + column, mask=mask, other=0.0)
        y += residual.to(tl.float32)
    tl.store(out_ptr + row * SIZE + column, y.to(out_ptr.dtype.element_ty), mask=mask)
