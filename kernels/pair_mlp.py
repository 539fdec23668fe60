"""The two products of an MLP as one kernel, for 129 to 256 rows, on Hopper GPUs.

For such a batch both are bound by arithmetic, and tiles of gate and up fill the multiprocessors
less than twice: in the second round some idle. Here these start on the other product meanwhile.

Life of a thread block, one on each multiprocessor
    1. It takes its tiles of `silu(x @ gate.T) * (x @ up.T)`, 128 rows by 128 columns, as
       `gated_linear` does, and tells when each is in memory.
    2. It takes one tile of `activated @ down.T`, 128 rows by 256 columns, over a part of the inner
       dimension: a long part from the front if it had one tile less than others, else one of
       several short parts. One warp copies ahead, and waits for each block of 128 inner elements
       until who makes it has told.
    3. The sums of a part are written as they are. Who reads them next adds them up
       (`sum_rms_norm`), always in the same order.

Told is by counters that only grow: a block is there when its counter has grown by two, one for
each half of the rows, since the last launch. How many launches there were each thread block keeps
for itself, beside the counters.

It takes no part in chained launches (`dispatch.chained_launch`), which gained nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import linear

from kernels.dispatch import is_hopper, num_multiprocessors
from kernels.gluon_api import HAS_GLUON, in_blocks
from kernels.pair_programs import pair_kernel
from kernels.silu_mul import silu_mul

_ROWS, _COLUMNS, _DEPTH = 128, 128, 64  # of a tile of gates, and of a step through it
_STAGES = 4


class Cut(NamedTuple):
    """How the second product is cut: `tiles` of 128 rows by 256 columns, each into a part of
    `front` blocks of 128 inner elements and `parts` shorter ones."""

    tiles: int
    front: int
    parts: int


def cut_of(hidden: int, inter: int, programs: int) -> Cut | None:
    """None where thread blocks do not fit the tiles."""
    gates, tiles = 2 * inter // _COLUMNS, 2 * hidden // (2 * _COLUMNS)
    last_round = gates % programs
    parts = programs // tiles - 1
    if gates < programs or not last_round or programs - last_round < tiles or parts < 1:
        return None
    # Who has one tile of gates less does as much of the second product more.
    blocks = inter // _COLUMNS
    front = round((hidden / _COLUMNS * parts + blocks) / (parts + 1))
    if front < 2 or blocks - max(front, (gates - last_round) // 2) < parts:
        return None
    return Cut(tiles, front, parts)


def fits_pair_mlp(gate_up: torch.Tensor, down: torch.Tensor) -> bool:
    """Whether `pair_mlp` runs here, with such matrices."""
    if not HAS_GLUON or not is_hopper(down.device) or down.dtype != gate_up.dtype:
        return False
    hidden, inter = down.shape
    return (
        down.dtype in (torch.bfloat16, torch.float16)
        and gate_up.shape == (2 * inter, hidden)
        and gate_up.is_contiguous()
        and down.is_contiguous()
        and hidden % (2 * _COLUMNS) == inter % _COLUMNS == 0
        and cut_of(hidden, inter, num_multiprocessors(down.device)) is not None
    )


def new_counters(down: torch.Tensor) -> torch.Tensor:
    """For launches that follow one another on a stream, with matrices of this shape."""
    size = 2 * down.shape[1] // _COLUMNS + num_multiprocessors(down.device)
    return torch.zeros(size, dtype=torch.int32, device=down.device)


def pair_mlp(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, counters: torch.Tensor
) -> torch.Tensor:
    """Parts of `(silu(gate) * up) @ down.T` with gate, up the halves of `x @ gate_up.T`: float32
    `[num_parts, num_rows, hidden]`.

    x: `[num_rows, hidden]`, contiguous, 129 to 256 rows; gate_up: `[2 * inter, hidden]`, gate
    first; down: `[hidden, inter]`. counters: of `new_counters`. What is activated is rounded to
    x's type. Needs a GPU of compute capability 9, see `fits_pair_mlp`; on a CPU any rows will do.
    """
    if x.is_cuda:
        return _pair_mlp_gluon(x, gate_up, down, counters)
    activated = silu_mul(linear(x, gate_up))
    return linear(activated.float(), down.float())[None]


def _pair_mlp_gluon(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, counters: torch.Tensor
) -> torch.Tensor:
    num_rows, hidden = x.shape
    inter, programs = down.shape[1], num_multiprocessors(x.device)
    cut = cut_of(hidden, inter, programs)
    assert cut is not None
    assert _ROWS < num_rows <= 2 * _ROWS
    assert x.is_contiguous()
    activated = x.new_empty(num_rows, inter)
    parts = x.new_empty(1 + cut.parts, num_rows, hidden, dtype=torch.float32)
    pair_kernel[(programs,)](
        in_blocks(x, _ROWS // 2, _DEPTH), in_blocks(gate_up[:inter], _COLUMNS, _DEPTH),
        in_blocks(gate_up[inter:], _COLUMNS, _DEPTH), in_blocks(activated, _ROWS // 2, _COLUMNS),
        in_blocks(activated, _ROWS // 2, _DEPTH), in_blocks(down, _COLUMNS, _DEPTH),
        parts, counters, num_rows, HIDDEN=hidden, INTER=inter, PROGRAMS=programs, TILES=cut.tiles,
        FRONT=cut.front, PARTS=cut.parts, STAGES=_STAGES, num_warps=4, maxnreg=168,
    )  # fmt: skip
    return parts
