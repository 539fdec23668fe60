"""Gathers scattered KV blocks into one contiguous buffer and scatters them back.

What lies in a block does not matter here: a pool is `[num_layers, num_blocks, unit_bytes]` bytes,
and a unit is what one layer keeps in one block. A packed buffer is `[num_layers, num_ids,
unit_bytes]`: the layers of a group one after the other, within a layer the blocks in the order of
`block_ids`.
"""

from __future__ import annotations

import torch

from kernels.dispatch import jit_for_any, runs_triton, tl

# Words of 8 bytes that one program copies: 8 KiB, four 16-byte loads in flight per thread.
_CHUNK_WORDS = 1024


def pack_blocks(
    pool: torch.Tensor,
    layer_start: int,
    num_layers: int,
    block_ids: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Copies `pool[layer_start + l, block_ids[i]]` to `out[l, i]`.

    pool: uint8 `[all_layers, num_blocks, unit_bytes]`, contiguous. block_ids: int64 `[num_ids]` on
    the pool's device. out: uint8 `[num_layers, num_ids, unit_bytes]`, contiguous.
    """
    group = _layer_group(pool, layer_start, num_layers, block_ids, out)
    group, packed = _as_words(group, out)
    if runs_triton(pool):
        _copy_units(group, packed, block_ids, unpacks=False)
    else:
        torch.index_select(group, 1, block_ids, out=packed)


def unpack_blocks(
    src: torch.Tensor,
    pool: torch.Tensor,
    layer_start: int,
    num_layers: int,
    block_ids: torch.Tensor,
) -> None:
    """Copies `src[l, i]` to `pool[layer_start + l, block_ids[i]]`; inverse of `pack_blocks`.

    Shapes and dtypes as there, src in the place of out. No block id may occur twice.
    """
    group = _layer_group(pool, layer_start, num_layers, block_ids, src)
    group, packed = _as_words(group, src)
    if runs_triton(pool):
        _copy_units(group, packed, block_ids, unpacks=True)
    else:
        group.index_copy_(1, block_ids, packed)


def _layer_group(
    pool: torch.Tensor,
    layer_start: int,
    num_layers: int,
    block_ids: torch.Tensor,
    packed: torch.Tensor,
) -> torch.Tensor:
    assert pool.dtype == packed.dtype == torch.uint8
    assert pool.is_contiguous()
    assert packed.is_contiguous()
    assert packed.shape == (num_layers, block_ids.shape[0], pool.shape[2])
    assert 0 <= layer_start <= layer_start + num_layers <= pool.shape[0]
    return pool[layer_start : layer_start + num_layers]


def _as_words(pool: torch.Tensor, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as int64 where their units allow it: bytes would be copied one at a time."""
    places = (pool.shape[2], pool.storage_offset(), packed.storage_offset())
    if any(place % 8 for place in places):
        return pool, packed
    return pool.view(torch.int64), packed.view(torch.int64)


def _copy_units(
    pool: torch.Tensor, packed: torch.Tensor, block_ids: torch.Tensor, *, unpacks: bool
) -> None:
    num_layers, num_ids, unit = packed.shape
    chunks = -(-unit // _CHUNK_WORDS)
    if packed.numel():
        _copy_units_kernel[(num_layers * num_ids * chunks,)](
            pool, packed, block_ids, num_ids, pool.shape[1], chunks,
            UNIT=unit, BLOCK=_CHUNK_WORDS, UNPACKS=unpacks, num_warps=4,
        )  # fmt: skip


@jit_for_any("num_ids")
def _copy_units_kernel(
    pool_ptr: tl.tensor, packed_ptr: tl.tensor, ids_ptr: tl.tensor, num_ids: tl.tensor,
    num_blocks: tl.tensor, chunks: tl.tensor, UNIT: tl.constexpr, BLOCK: tl.constexpr,
    UNPACKS: tl.constexpr,
) -> None:  # fmt: skip
    program = tl.program_id(0)
    packed_unit = (program // chunks).to(tl.int64)
    block_id = tl.load(ids_ptr + packed_unit % num_ids).to(tl.int64)
    pool_unit = packed_unit // num_ids * num_blocks + block_id
    column = program % chunks * BLOCK + tl.arange(0, BLOCK)
    mask = column < UNIT
    pool_words = pool_ptr + pool_unit * UNIT + column
    packed_words = packed_ptr + packed_unit * UNIT + column
    if UNPACKS:
        tl.store(pool_words, tl.load(packed_words, mask=mask), mask=mask)
    else:
        tl.store(packed_words, tl.load(pool_words, mask=mask), mask=mask)
