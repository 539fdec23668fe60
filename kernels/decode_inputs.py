"""What a decode step reads, made on the device from what the host knows before the last one ends.

The host knows each row's position; its token may have been drawn by a step that still runs, then
the row says which of that step's rows drew it. Block tables stay on the device: a step changes
few of their entries.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from kernels.dispatch import jit_for_any, runs_triton, tl

_ROWS = 128
_ENTRIES = 512


class DecodeInputs(NamedTuple):
    """By row; a row that computes nothing has token 0, position 0, slot -1 and seq_len 0."""

    token_ids: torch.Tensor  # int64 [n]
    positions: torch.Tensor  # int64 [n]
    slot_mapping: torch.Tensor  # int64 [n]
    seq_lens: torch.Tensor  # int32 [n]

    @classmethod
    def empty(cls, num_rows: int, device: torch.device) -> DecodeInputs:
        token_ids, positions, slots = torch.empty(3, num_rows, dtype=torch.int64, device=device)
        seq_lens = torch.empty(num_rows, dtype=torch.int32, device=device)
        return cls(token_ids, positions, slots, seq_lens)

    def first(self, num_rows: int) -> DecodeInputs:
        return DecodeInputs(
            self.token_ids[:num_rows],
            self.positions[:num_rows],
            self.slot_mapping[:num_rows],
            self.seq_lens[:num_rows],
        )


def fill_decode_inputs(
    ends: torch.Tensor,
    tokens: torch.Tensor,
    sources: torch.Tensor,
    drawn: torch.Tensor,
    block_tables: torch.Tensor,
    block_size: int,
    out: DecodeInputs,
) -> None:
    """Fill `out`, of n rows.

    `ends` int64 [n]: seq_lens with this step's token, 0 for a row that computes nothing. `sources`
    int32 [n]: the row of `drawn` (int64) that holds the token, or -1: then `tokens` (int32 [n])
    does. A row whose draw failed goes on with token 0, and nobody will look at it. `block_tables`
    int32 `[at least n, width]`, last dimension contiguous.
    """
    if runs_triton(ends):
        num_rows = len(ends)
        _fill_kernel[(-(-num_rows // _ROWS),)](
            ends, tokens, sources, drawn, block_tables, block_tables.stride(0), *out,
            num_rows, BLOCK_SIZE=block_size, ROWS=_ROWS, num_warps=4,
        )  # fmt: skip
        return
    _fill_reference(ends, tokens, sources, drawn, block_tables, block_size, out)


def write_entries(tables: torch.Tensor, places: torch.Tensor, values: torch.Tensor) -> None:
    """`tables.view(-1)[places] = values`; `tables` int32 contiguous, both others int32 [n]."""
    num_entries = len(places)
    if runs_triton(tables):
        if num_entries:
            _write_kernel[(-(-num_entries // _ENTRIES),)](
                tables, places, values, num_entries, ENTRIES=_ENTRIES, num_warps=4
            )
        return
    tables.view(-1).numpy()[places.numpy()] = values.numpy()


def _fill_reference(
    ends: torch.Tensor,
    tokens: torch.Tensor,
    sources: torch.Tensor,
    drawn: torch.Tensor,
    block_tables: torch.Tensor,
    block_size: int,
    out: DecodeInputs,
) -> None:
    # numpy: on a CPU a call of torch costs more than the work of a few rows.
    num_rows = len(ends)
    end, source = ends.numpy(), sources.numpy()
    position = np.maximum(end - 1, 0)
    block = block_tables.numpy()[np.arange(num_rows), position // block_size].astype(np.int64)
    known = np.maximum(drawn.numpy()[np.maximum(source, 0)], 0)
    token = np.where(source >= 0, known, tokens.numpy())
    slot = block * block_size + position % block_size
    out.token_ids.numpy()[:] = np.where(end > 0, token, 0)
    out.positions.numpy()[:] = position
    out.slot_mapping.numpy()[:] = np.where(end > 0, slot, -1)
    out.seq_lens.numpy()[:] = end


@jit_for_any("num_rows")
def _fill_kernel(
    ends_ptr: tl.tensor, tokens_ptr: tl.tensor, sources_ptr: tl.tensor, drawn_ptr: tl.tensor,
    tables_ptr: tl.tensor, table_stride: tl.tensor, token_ids_ptr: tl.tensor,
    positions_ptr: tl.tensor, slots_ptr: tl.tensor, seq_lens_ptr: tl.tensor, num_rows: tl.tensor,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = row < num_rows
    end = tl.load(ends_ptr + row, mask=mask, other=0)
    is_row = end > 0
    position = tl.maximum(end - 1, 0)
    source = tl.load(sources_ptr + row, mask=mask, other=-1)
    token = tl.load(tokens_ptr + row, mask=mask, other=0).to(tl.int64)
    drawn = tl.load(drawn_ptr + source, mask=is_row & (source >= 0), other=0)
    token = tl.where(source >= 0, tl.maximum(drawn, 0), token)
    place = row.to(tl.int64) * table_stride + position // BLOCK_SIZE
    block = tl.load(tables_ptr + place, mask=is_row, other=0).to(tl.int64)
    slot = block * BLOCK_SIZE + position % BLOCK_SIZE
    tl.store(token_ids_ptr + row, tl.where(is_row, token, 0), mask=mask)
    tl.store(positions_ptr + row, position, mask=mask)
    tl.store(slots_ptr + row, tl.where(is_row, slot, -1), mask=mask)
    tl.store(seq_lens_ptr + row, end.to(tl.int32), mask=mask)


@jit_for_any("places_ptr", "values_ptr", "num_entries")
def _write_kernel(
    tables_ptr: tl.tensor, places_ptr: tl.tensor, values_ptr: tl.tensor, num_entries: tl.tensor,
    ENTRIES: tl.constexpr,
) -> None:  # fmt: skip
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    mask = entry < num_entries
    place = tl.load(places_ptr + entry, mask=mask, other=0)
    tl.store(tables_ptr + place, tl.load(values_ptr + entry, mask=mask, other=0), mask=mask)
