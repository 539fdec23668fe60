"""Parts of a product added to the residual stream, and the norm that follows, as one kernel.

A product with few outputs is cut along its inner dimension to occupy a GPU. The parts lie in the
second-level cache; who would read their sum reads them.
"""

from __future__ import annotations

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


def sum_rms_norm(
    residual: torch.Tensor, parts: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Adds the parts to `residual`, in its memory; `rms_norm` of that.

    residual: `[num_rows, size]`; parts: float32 `[num_parts, num_rows, size]`; both contiguous.
    weight: `[size]`. Summed in float32, in the order of parts, and rounded once.
    """
    _check(residual, parts)
    if runs_triton(residual):
        y = torch.empty_like(residual)
        _sum_rms_norm_triton(residual, parts, weight, y, eps)
        return y
    return rms_norm(add_parts(residual, parts), weight, eps)


def add_parts(residual: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
    """`residual` with the parts added, in its memory. As `sum_rms_norm`."""
    _check(residual, parts)
    if runs_triton(residual):
        _sum_rms_norm_triton(residual, parts, None, None, 0.0)
        return residual
    return residual.copy_(residual.float() + parts.sum(0))


def _check(residual: torch.Tensor, parts: torch.Tensor) -> None:
    assert residual.is_contiguous()
    assert parts.is_contiguous()
    assert parts.dtype == torch.float32
    assert parts.shape[1:] == residual.shape


def _sum_rms_norm_triton(
    residual: torch.Tensor,
    parts: torch.Tensor,
    weight: torch.Tensor | None,
    y: torch.Tensor | None,
    eps: float,
) -> None:
    num_rows, size = residual.shape
    if num_rows == 0:
        return
    chained = chained_launch(residual.device)
    _sum_rms_norm_kernel[(num_rows,)](
        residual, parts, weight, y, residual.numel(), eps, SIZE=size,
        BLOCK=next_power_of_two(size), PARTS=len(parts), CHAINED=chained,
        num_warps=_num_warps(size), launch_pdl=chained,
    )  # fmt: skip


def _num_warps(size: int) -> int:
    """8 elements a thread: two 16-byte loads of each part in flight."""
    return min(16, max(1, next_power_of_two(size) // 256))


@jit
def _sum_rms_norm_kernel(
    residual_ptr: tl.tensor, parts_ptr: tl.tensor, weight_ptr: tl.tensor, y_ptr: tl.tensor,
    part_stride: tl.tensor, eps: tl.tensor, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    PARTS: tl.constexpr, CHAINED: tl.constexpr,
) -> None:  # fmt: skip
    """weight_ptr None: nothing but the sum."""
    column = tl.arange(0, BLOCK)
    mask = column < SIZE
    weight = 0.0
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    place = tl.program_id(0).to(tl.int64) * SIZE + column
    total = tl.load(parts_ptr + place, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        total += tl.load(parts_ptr + part * part_stride + place, mask=mask, other=0.0)
    total += tl.load(residual_ptr + place, mask=mask, other=0.0).to(tl.float32)
    rounded = total.to(residual_ptr.dtype.element_ty)
    tl.store(residual_ptr + place, rounded, mask=mask)
    if weight_ptr is not None:
        x = rounded.to(tl.float32)
        scale = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=0) / SIZE + eps)
        tl.store(y_ptr + place, (x * scale * weight).to(y_ptr.dtype.element_ty), mask=mask)
