"""Brings the columns of a matrix that ranks of a node have computed to the first of them.

Each rank writes its columns to where they belong in the memory of rank 0, over NVLink, and then
tells all others, by the letters and inboxes of `peer_sum`: one call is one epoch of theirs. Every
program of a launch works alone:

    1. It copies its tiles.
    2. A fence: whoever finds the letter that is written next finds the tiles. The end of a kernel
       promises that to its own GPU only: when a kernel of its own wrote the letter behind one that
       copied, the first step after a pause drew from logits that were not there yet (two H200).
    3. It writes its letters, and waits for those of the program like itself on all other ranks.

All ranks cut the matrix into as many tiles for as many programs. Behind the kernel rank 0 has all
columns. Others must not write there again before they know that rank 0 has read them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.dispatch import chained_launch, gdc_launch_dependents, gdc_wait, jit_for_any, tl
from kernels.peer_sum import MAX_PROGRAMS, fence

if TYPE_CHECKING:
    import torch

    from kernels.peer_sum import PeerInboxes

_BLOCK = 2048


def peer_push(part: torch.Tensor, out: torch.Tensor, inboxes: PeerInboxes) -> None:
    """Copies part to columns `rank * columns` and following of out, and meets the other ranks.

    part: `[rows, at most columns]`, contiguous. out: the same memory, of rank 0, on all ranks,
    `[at least rows, size * columns]`, contiguous, in part's dtype. Rows are the same on all ranks.
    """
    assert part.is_contiguous()
    assert out.is_contiguous()
    assert part.dtype == out.dtype
    num_rows, width = part.shape
    columns = out.shape[1] // inboxes.size
    assert num_rows <= len(out)
    assert width <= columns
    if num_rows == 0:
        return
    num_tiles = num_rows * -(-columns // _BLOCK)
    chained = chained_launch(part.device)
    _peer_push_kernel[(min(num_tiles, MAX_PROGRAMS),)](
        part, out, inboxes.addresses, inboxes.epochs, num_tiles,
        WIDTH=width, COLUMNS=columns, RANK=inboxes.rank, SIZE=inboxes.size,
        CAPACITY=inboxes.capacity, REGION=inboxes.capacity // MAX_PROGRAMS, BLOCK=_BLOCK,
        COMPILED=part.is_cuda, CHAINED=chained, num_warps=8, launch_pdl=chained,
    )  # fmt: skip


@jit_for_any("num_tiles")
def _peer_push_kernel(
    part_ptr: tl.tensor, out_ptr: tl.tensor, inboxes_ptr: tl.tensor, epochs_ptr: tl.tensor,
    num_tiles: tl.tensor, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
    SIZE: tl.constexpr, CAPACITY: tl.constexpr, REGION: tl.constexpr, BLOCK: tl.constexpr,
    COMPILED: tl.constexpr, CHAINED: tl.constexpr,
) -> None:  # fmt: skip
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    TILES: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK  # of a row
    program = tl.program_id(0)
    epoch = tl.load(epochs_ptr + program) + 1
    for tile in range(program, num_tiles, tl.num_programs(0)):
        row = tl.cast(tile // TILES, tl.int64)
        column = tile % TILES * BLOCK + tl.arange(0, BLOCK)
        mask = column < WIDTH
        got = tl.load(part_ptr + row * WIDTH + column, mask=mask)
        tl.store(out_ptr + row * (SIZE * COLUMNS) + RANK * COLUMNS + column, got, mask=mask)
    fence(COMPILED)
    place = (epoch & 1).to(tl.int64) * (SIZE * CAPACITY) + program * REGION
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            inbox = tl.load(inboxes_ptr + peer).to(tl.pointer_type(tl.int64))
            tl.store(inbox + place + RANK * CAPACITY, epoch.to(tl.int64) << 32)
    own = tl.load(inboxes_ptr + RANK).to(tl.pointer_type(tl.int64))
    for sender in tl.static_range(SIZE):
        if sender != RANK:
            letter = own + place + sender * CAPACITY
            while (tl.load(letter, volatile=True) >> 32).to(tl.int32) != epoch:
                pass
    fence(COMPILED)
    tl.store(epochs_ptr + program, epoch)
