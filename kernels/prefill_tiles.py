"""Which pieces prefill attention is computed in, decided on the device once for all layers.

A piece is up to 128 consecutive queries of a sequence, for every head. Pieces are listed by cost,
the longest first: with causality the cost of a piece is its last position, and thread blocks that
draw from such a list end at about the same time.

Without reading lengths on the host: there are at most `num_tokens // 128 + num_seqs` pieces. Slot
`cu_seqlens_q[s] // 128 + s` is the first one of sequence s; slots that no piece needs cost nothing
and come last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kernels.dispatch import jit, jit_for_any, runs_triton, tl

if TYPE_CHECKING:
    from typing import TypeAlias

# Queries of a piece.
PIECE = 128
# Slots that one program ranks; it compares them with all slots, as many at a time.
_GROUP = 32

PrefillTiles: TypeAlias = torch.Tensor


def plan_tiles(cu_seqlens_q: torch.Tensor, seq_lens: torch.Tensor, num_tokens: int) -> PrefillTiles:
    """int32 `[1 + num_tokens // 128 + num_seqs, 4]` on the device of the lengths.

    cu_seqlens_q, seq_lens: as in `prefill_attention`; num_tokens: at least the queries of all
    sequences. Row 0: how many pieces there are, and three zeros, the second number being the
    counter that work is drawn from. Then for each piece its first query token, its number of
    queries, the position of its first query, and its sequence.
    """
    num_seqs = seq_lens.shape[0]
    num_slots = num_tokens // PIECE + num_seqs
    tiles = torch.zeros((1 + num_slots, 4), dtype=torch.int32, device=seq_lens.device)
    if num_seqs == 0:
        return tiles
    if not runs_triton(seq_lens):
        raise ValueError("pieces are planned on a GPU only")
    _plan_kernel[(-(-num_slots // _GROUP),)](
        cu_seqlens_q, seq_lens, tiles, num_seqs, num_slots,
        PIECE=PIECE, GROUP=_GROUP, SEQS=_extent(num_seqs), num_warps=4,
    )  # fmt: skip
    return tiles


def _extent(num_seqs: int) -> int:
    """At least num_seqs; few values, for each is a compilation."""
    extent = 64
    while extent < num_seqs:
        extent *= 4
    return extent


@jit_for_any("num_seqs", "num_slots")
def _plan_kernel(
    starts_ptr: tl.tensor, lens_ptr: tl.tensor, tiles_ptr: tl.tensor, num_seqs: tl.tensor,
    num_slots: tl.tensor, PIECE: tl.constexpr, GROUP: tl.constexpr, SEQS: tl.constexpr,
) -> None:  # fmt: skip
    sequence = tl.arange(0, SEQS)
    starts = tl.load(starts_ptr + sequence, mask=sequence < num_seqs, other=0)
    first_slots = tl.where(sequence < num_seqs, starts // PIECE + sequence, 2147483647)
    slot = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    token, rows, position, owner = _piece(
        slot, first_slots, starts_ptr, lens_ptr, num_slots, PIECE
    )  # fmt: skip
    cost = tl.where(rows > 0, position + rows, 0)
    rank = tl.zeros([GROUP], tl.int32)
    num_pieces = 0
    for base in range(0, num_slots, GROUP):
        other = base + tl.arange(0, GROUP)
        _, other_rows, other_position, _ = _piece(
            other, first_slots, starts_ptr, lens_ptr, num_slots, PIECE
        )  # fmt: skip
        other_cost = tl.where(other_rows > 0, other_position + other_rows, 0)
        num_pieces += tl.sum((other_cost > 0).to(tl.int32), axis=0)
        ahead = other_cost[None, :] > cost[:, None]
        ahead |= (other_cost[None, :] == cost[:, None]) & (other[None, :] < slot[:, None])
        ahead &= (other < num_slots)[None, :]
        rank += tl.sum(ahead.to(tl.int32), axis=1)
    row_ptr = tiles_ptr + (1 + rank) * 4
    mask = (slot < num_slots) & (rows > 0)
    tl.store(row_ptr, token, mask=mask)
    tl.store(row_ptr + 1, rows, mask=mask)
    tl.store(row_ptr + 2, position, mask=mask)
    tl.store(row_ptr + 3, owner, mask=mask)
    tl.store(tiles_ptr, num_pieces, mask=tl.program_id(0) == 0)


@jit
def _piece(
    slot: tl.tensor, first_slots: tl.tensor, starts_ptr: tl.tensor, lens_ptr: tl.tensor,
    num_slots: tl.tensor, PIECE: tl.constexpr,
) -> Any:  # fmt: skip
    """First query token, number of queries, first position and sequence of each slot."""
    owner = tl.sum((first_slots[None, :] <= slot[:, None]).to(tl.int32), axis=1) - 1
    mask = slot < num_slots
    start = tl.load(starts_ptr + owner, mask=mask, other=0)
    query_len = tl.load(starts_ptr + owner + 1, mask=mask, other=0) - start
    seq_len = tl.load(lens_ptr + owner, mask=mask, other=0)
    first_row = (slot - (start // PIECE + owner)) * PIECE
    rows = tl.minimum(tl.maximum(query_len - first_row, 0), PIECE)
    return start + first_row, rows, seq_len - query_len + first_row, owner
