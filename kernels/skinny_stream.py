"""Weights streamed through shared memory into tensor cores, for products of few rows. In Gluon.

1. One program per multiprocessor walks tiles of 16 outputs, each over all inputs, so nothing is
   summed between programs. The bulk copy engine fills a ring of stages; the program multiplies the
   oldest while the others are on their way, across the ends of tiles too. With a gate a tile is 8
   gates and the 8 outputs behind them (of four bits, where packing keeps these apart, 16 and 16).
2. A stage holds, for each of 8 warps, blocks of 16 outputs by 64 inputs (`skinny_operand`): warps
   share the inputs and add their sums at the end of a tile. The weights are the tensor cores' wide
   operand, the few rows of x the narrow one (8 columns).
3. Rows of x stay in registers for all tiles where they are few enough (`KEEP`); else each stage
   asks for the next one's before it waits for its own weights.
4. The ring is filled before the kernel in front has ended (`chained_launch`): in a decode step that
   is the time between two kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels.dispatch import chained_launch, is_hopper, next_power_of_two, num_multiprocessors
from kernels.gluon_api import HAS_GLUON
from kernels.skinny_operand import TILE_OUT, WARPS, descriptor, word_layouts
from kernels.skinny_walk import stream_kernel

if TYPE_CHECKING:
    from kernels.int4_packing import Int4Weight
    from kernels.peer_sum import PeerInboxes

_FP8 = torch.float8_e4m3fn
# Columns of the narrow operand; more would take registers that a stage's blocks of x need.
MAX_ROWS = 8
# Inputs up to which a program keeps x in registers: half of what it may have; with a norm, which
# needs x twice, a quarter.
_MAX_KEPT, _MAX_KEPT_NORMED = 7168, 4096


def can_stream(
    device: torch.device, in_size: int, weight_dtype: torch.dtype, *, gated_out: int = TILE_OUT
) -> bool:
    """Whether `stream` takes such weights (int32: four-bit ones); gated_out: half their outputs."""
    if not HAS_GLUON or not is_hopper(device):
        return False
    if weight_dtype == torch.int32:
        return in_size % 64 == 0 and gated_out % TILE_OUT == 0
    if weight_dtype == _FP8:
        return in_size % 128 == 0
    return weight_dtype in (torch.bfloat16, torch.float16) and in_size % 64 == 0


def stream(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    weight_scale: torch.Tensor | None = None,
    int4: Int4Weight | None = None,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    peers: PeerInboxes | None = None,
) -> None:
    """`skinny_linear` of 1 to MAX_ROWS rows. With int4, weight is its codes. With peers, who make
    the same call with their columns of the matrix, out is the sum over all ranks; not gated.

    Where weights become float16, x does too: normed, or else a sixteenth of it, which saturates
    from 1e6 on and loses what is below 1e-6.
    """
    num_rows, in_size = x.shape
    out_size = out.shape[1]
    bits = 4 if int4 is not None else 8 * weight.itemsize
    assert num_rows <= MAX_ROWS
    paired = gated and int4 is None
    stages, blocks = _ring(bits, in_size, gated and not paired)
    num_tiles = -(-out_size // (TILE_OUT // 2 if paired else TILE_OUT))
    num_programs = min(num_tiles, num_multiprocessors(x.device))
    chained = chained_launch(x.device)
    rank, size, capacity = (0, 1, 0) if peers is None else (peers.rank, peers.size, peers.capacity)
    assert peers is None or (num_rows * out_size <= capacity and num_programs <= len(peers.epochs))
    stream_kernel[(num_programs,)](
        descriptor(weight, bits, blocks, paired=paired), x, weight_scale, bias, norm_weight,
        residual, None if int4 is None else int4.zeros, None if int4 is None else int4.scales, out,
        None if peers is None else peers.addresses, None if peers is None else peers.epochs,
        num_rows, x.stride(0),
        0 if weight_scale is None or len(weight_scale) == 1 else 1, eps,
        OUT=out_size, IN=in_size, ROWS=MAX_ROWS, BITS=bits, STAGES=stages, BLOCKS=blocks,
        GROUP=0 if int4 is None else int4.group_size, WORDS=word_layouts(bits)[1], GATED=gated,
        PAIRED=paired, RANK=rank, SIZE=size, CAPACITY=capacity,
        TILES=next_power_of_two(-(-num_tiles // num_programs)),
        KEEP=keeps_x(in_size, norm_weight is not None), CHAINED=chained, num_warps=WARPS,
        launch_pdl=chained,
    )  # fmt: skip


def keeps_x(in_size: int, is_normed: bool = True) -> bool:
    """Whether a program reads x once, not once for each tile of outputs."""
    return in_size <= (_MAX_KEPT_NORMED if is_normed else _MAX_KEPT)


def _ring(bits: int, in_size: int, two_rings: bool) -> tuple[int, int]:
    """Stages, and blocks of each warp in a stage: 192 KiB in all. Measured on an H200."""
    blocks = 8 if bits == 4 else 4
    per_warp = -(-in_size // (WARPS * (128 if bits == 8 else 64)))
    while blocks > 1 and per_warp % blocks:
        blocks //= 2
    stages = (48 if bits == 4 else 12) // blocks
    if not two_rings:
        return stages, blocks
    return (stages // 2, blocks) if stages > 3 else (stages, blocks // 2)
