"""The gated activation of a Llama-style MLP: silu(gate) * up."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.dispatch import chained_launch, gdc_launch_dependents, gdc_wait, jit, runs_triton, tl

_BLOCK = 1024


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`[..., 2 * intermediate]`, contiguous, gate in the first half -> `[..., intermediate]`.

    Contiguous, in gate_up's dtype; computed in float32 on the GPU.
    """
    assert gate_up.shape[-1] % 2 == 0
    if runs_triton(gate_up):
        return _silu_mul_triton(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _silu_mul_triton(gate_up: torch.Tensor) -> torch.Tensor:
    assert gate_up.is_contiguous()
    size = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], size), dtype=gate_up.dtype, device=gate_up.device)
    num_rows = out.numel() // size
    if num_rows:
        blocks_per_row = -(-size // _BLOCK)
        chained = chained_launch(gate_up.device)
        _silu_mul_kernel[(num_rows * blocks_per_row,)](
            gate_up, out, blocks_per_row, SIZE=size, BLOCK=_BLOCK, CHAINED=chained, num_warps=4,
            launch_pdl=chained,
        )  # fmt: skip
    return out


@jit
def _silu_mul_kernel(
    gate_up_ptr: tl.tensor, out_ptr: tl.tensor, blocks_per_row: tl.tensor, SIZE: tl.constexpr,
    BLOCK: tl.constexpr, CHAINED: tl.constexpr,
) -> None:  # fmt: skip
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    program = tl.program_id(0)
    row = (program // blocks_per_row).to(tl.int64)
    column = program % blocks_per_row * BLOCK + tl.arange(0, BLOCK)
    mask = column < SIZE
    gate_row = gate_up_ptr + row * 2 * SIZE
    gate = tl.load(gate_row + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_row + SIZE + column, mask=mask, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * SIZE + column, y.to(out_ptr.dtype.element_ty), mask=mask)
