"""Root-mean-square norm over the last dimension."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.dispatch import (
    chained_launch,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    next_power_of_two,
    runs_triton,
    tl,
)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`norm(x) * weight`, contiguous, in x's dtype; computed in float32.

    x: `[..., size]`, last dimension contiguous; a view of 2 or 3 dimensions with strides is fine.
    weight: `[size]`.
    """
    assert x.shape[-1] == weight.shape[0]
    if runs_triton(x):
        return _rms_norm_triton(x, weight, eps)
    return _rms_norm_reference(x, weight, eps)


def _rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """In half precision torch's own converts at each of its steps; here that is done once."""
    if x.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    wide = x.float()
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return wide.mul_(scale).mul_(weight.float()).to(x.dtype)


def _rms_norm_triton(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    size = x.shape[-1]
    # A per-head norm sees [num_tokens, num_heads, head_size], strided where it is cut out of qkv.
    rows = x if x.dim() == 3 else x.reshape(-1, 1, size)
    assert rows.stride(-1) == 1
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_rows = rows.shape[0] * rows.shape[1]
    chained = chained_launch(x.device)
    if num_rows:
        _rms_norm_kernel[(num_rows,)](
            rows, weight, y, rows.stride(0), rows.stride(1), rows.shape[1], eps,
            SIZE=size, BLOCK=next_power_of_two(size), CHAINED=chained,
            num_warps=_num_warps(size), launch_pdl=chained,
        )  # fmt: skip
    return y


def _num_warps(size: int) -> int:
    """16 elements a thread: two 16-byte loads of bfloat16 in flight."""
    return min(16, max(1, next_power_of_two(size) // 512))


@jit
def _rms_norm_kernel(
    x_ptr: tl.tensor, weight_ptr: tl.tensor, y_ptr: tl.tensor, x_stride: tl.tensor,
    x_head_stride: tl.tensor, num_heads: tl.tensor, eps: tl.tensor, SIZE: tl.constexpr,
    BLOCK: tl.constexpr, CHAINED: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < SIZE
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    x_row = x_ptr + row // num_heads * x_stride + row % num_heads * x_head_stride
    x = tl.load(x_row + column, mask=mask, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=0) / SIZE + eps)
    tl.store(
        y_ptr + row * SIZE + column, (x * scale * weight).to(y_ptr.dtype.element_ty), mask=mask
    )
