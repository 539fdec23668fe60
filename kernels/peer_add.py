"""Sums a large tensor over the ranks of a node: each reads those of the others over NVLink.

1. A rank puts its summand into a buffer of its own that the others map.
2. All ranks meet (`peer_meet`): every summand is there.
3. This kernel reads all of them and adds them up in the order of ranks, in float32: all ranks get
   the same bits.

Two buffers take turns. Who puts a summand into one has met the others since they read from it:
they read before they came to the last meeting. A small tensor is summed faster by `peer_sum`,
which needs no meeting but sends twice the bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.dispatch import jit_for_any, num_multiprocessors, runs_triton, tl

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

_BLOCK = 4096
_UNIT = 8  # what is read at once
_PROGRAMS_PER_MULTIPROCESSOR = 2


def peer_add(summands: Sequence[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
    """Writes the sum into out, and returns it.

    summands: of all ranks in their order, as this device maps them; contiguous, alike in shape and
    dtype, and like out; a multiple of 8 elements. out: not among them.
    """
    assert out.is_contiguous()
    assert all(each.is_contiguous() and each.shape == out.shape for each in summands)
    size = out.numel()
    assert size % _UNIT == 0
    if not runs_triton(out):
        total = summands[0].float()
        for each in summands[1:]:
            total = total + each.float()
        return out.copy_(total)
    if size:
        most = _PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors(out.device)
        _peer_add_kernel[(min(-(-size // _BLOCK), most),)](
            tuple(summands), out, size // _UNIT, SIZE=len(summands), BLOCK=_BLOCK, UNIT=_UNIT,
            num_warps=8,
        )  # fmt: skip
    return out


@jit_for_any("num_units")
def _peer_add_kernel(
    summands: tl.tuple, out_ptr: tl.tensor, num_units: tl.tensor, SIZE: tl.constexpr,
    BLOCK: tl.constexpr, UNIT: tl.constexpr,
) -> None:  # fmt: skip
    size = num_units * UNIT
    for begin in range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
        place = begin + tl.arange(0, BLOCK)
        mask = place < size
        total = tl.load(summands[0] + place, mask=mask, other=0.0).to(tl.float32)
        for rank in tl.static_range(1, SIZE):
            total += tl.load(summands[rank] + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=mask)
