"""Gathers scattered KV blocks into one contiguous buffer and scatters them back.

What lies in a block does not matter here: a pool is `[num_layers, num_blocks, unit_bytes]` bytes,
and a unit is what one layer keeps in one block. A packed buffer is `[num_layers, num_ids,
unit_bytes]`: the layers of a group one after the other, within a layer the blocks in the order of
`block_ids`.

A pool may hold only part of each unit, for a model that several GPUs share. Then a packed unit has
two halves (keys and values), each cut into equal parts, one for each pool:

    packed unit   k0 k1 .. | v0 v1 ..        unit of pool 1   k1 | v1

so that buffers look alike however many pools there are on either side.

Whole blocks (`pack_whole_blocks`) lie the other way round, `[num_ids, num_layers, unit_bytes]`:
each block is one run of bytes, to be kept apart from the others.
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
    *,
    part: int = 0,
    num_parts: int = 1,
) -> None:
    """Copies `pool[layer_start + l, block_ids[i]]` to `out[l, i]`, or to its part of it.

    pool: uint8 `[all_layers, num_blocks, unit_bytes]`, contiguous. block_ids: int64 `[num_ids]`.
    out: uint8 `[num_layers, num_ids, num_parts * unit_bytes]`, contiguous, on the device of
    block_ids, which must reach the pool's memory.
    """
    group = _layer_group(pool, layer_start, num_layers, block_ids, out, part, num_parts)
    group, packed = _as_words(group, out, num_parts)
    if runs_triton(pool):
        _copy_units(group, packed, block_ids, part, num_parts, unpacks=False)
    elif num_parts == 1:
        torch.index_select(group, 1, block_ids, out=packed)
    else:
        halves = _part_of(packed, part, num_parts)
        halves.copy_(group.index_select(1, block_ids).view(halves.shape))


def unpack_blocks(
    src: torch.Tensor,
    pool: torch.Tensor,
    layer_start: int,
    num_layers: int,
    block_ids: torch.Tensor,
    *,
    part: int = 0,
    num_parts: int = 1,
) -> None:
    """Copies `src[l, i]` to `pool[layer_start + l, block_ids[i]]`; inverse of `pack_blocks`.

    Shapes and dtypes as there, src in the place of out. No block id may occur twice.
    """
    group = _layer_group(pool, layer_start, num_layers, block_ids, src, part, num_parts)
    group, packed = _as_words(group, src, num_parts)
    if runs_triton(pool):
        _copy_units(group, packed, block_ids, part, num_parts, unpacks=True)
    elif num_parts == 1:
        group.index_copy_(1, block_ids, packed)
    else:
        units = _part_of(packed, part, num_parts).reshape(num_layers, len(block_ids), -1)
        group.index_copy_(1, block_ids, units)


def pack_whole_blocks(
    pool: torch.Tensor,
    block_ids: torch.Tensor,
    out: torch.Tensor,
    *,
    part: int = 0,
    num_parts: int = 1,
) -> None:
    """Copies `pool[l, block_ids[i]]` to `out[i, l]`, or to its part of it, for all layers.

    Shapes and dtypes as `pack_blocks` has them, but out: `[num_ids, all_layers, num_parts *
    unit_bytes]`.
    """
    _check_whole(pool, block_ids, out, num_parts)
    words, packed = _as_words(pool, out, num_parts)
    if runs_triton(pool):
        _copy_units(words, packed, block_ids, part, num_parts, unpacks=False, by_block=True)
        return
    parts = _parts_of_whole(packed, part, num_parts)
    units = words.index_select(1, block_ids)
    parts.copy_(units.view(*units.shape[:2], *parts.shape[2:]).transpose(0, 1))


def unpack_whole_blocks(
    src: torch.Tensor,
    pool: torch.Tensor,
    block_ids: torch.Tensor,
    *,
    part: int = 0,
    num_parts: int = 1,
) -> None:
    """Copies `src[i, l]` to `pool[l, block_ids[i]]`; inverse of `pack_whole_blocks`. No block id
    may occur twice."""
    _check_whole(pool, block_ids, src, num_parts)
    words, packed = _as_words(pool, src, num_parts)
    if runs_triton(pool):
        _copy_units(words, packed, block_ids, part, num_parts, unpacks=True, by_block=True)
        return
    units = _parts_of_whole(packed, part, num_parts).transpose(0, 1)
    words.index_copy_(1, block_ids, units.flatten(2))


def _check_whole(
    pool: torch.Tensor, block_ids: torch.Tensor, packed: torch.Tensor, num_parts: int
) -> None:
    assert num_parts == 1 or pool.shape[2] % 2 == 0
    assert pool.dtype == packed.dtype == torch.uint8
    assert pool.is_contiguous()
    assert packed.is_contiguous()
    assert packed.shape == (block_ids.shape[0], pool.shape[0], num_parts * pool.shape[2])


def _layer_group(
    pool: torch.Tensor,
    layer_start: int,
    num_layers: int,
    block_ids: torch.Tensor,
    packed: torch.Tensor,
    part: int,
    num_parts: int,
) -> torch.Tensor:
    assert 0 <= part < num_parts
    assert num_parts == 1 or pool.shape[2] % 2 == 0
    assert pool.dtype == packed.dtype == torch.uint8
    assert pool.is_contiguous()
    assert packed.is_contiguous()
    assert packed.shape == (num_layers, block_ids.shape[0], num_parts * pool.shape[2])
    assert 0 <= layer_start <= layer_start + num_layers <= pool.shape[0]
    return pool[layer_start : layer_start + num_layers]


def _as_words(
    pool: torch.Tensor, packed: torch.Tensor, num_parts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as int64 where their pieces allow it: bytes would be copied one at a time."""
    piece = pool.shape[2] // _num_pieces(num_parts)
    places = (piece, pool.storage_offset(), packed.storage_offset())
    if any(place % 8 for place in places):
        return pool, packed
    return pool.view(torch.int64), packed.view(torch.int64)


def _num_pieces(num_parts: int) -> int:
    """Stretches of a pool's unit that stay together in a packed one."""
    return 1 if num_parts == 1 else 2


def _part_of(packed: torch.Tensor, part: int, num_parts: int) -> torch.Tensor:
    """`[num_layers, num_ids, 2, bytes or words of a part]`, a view."""
    num_layers, num_ids, _ = packed.shape
    return packed.view(num_layers, num_ids, 2, num_parts, -1)[:, :, :, part]


def _parts_of_whole(packed: torch.Tensor, part: int, num_parts: int) -> torch.Tensor:
    """`[num_ids, num_layers, pieces, bytes or words of a part]`, a view."""
    num_ids, num_layers, _ = packed.shape
    pieces = _num_pieces(num_parts)
    return packed.view(num_ids, num_layers, pieces, num_parts, -1)[:, :, :, part]


def _copy_units(
    pool: torch.Tensor,
    packed: torch.Tensor,
    block_ids: torch.Tensor,
    part: int,
    num_parts: int,
    *,
    unpacks: bool,
    by_block: bool = False,
) -> None:
    num_outer, num_inner, packed_unit = packed.shape  # blocks in layers, or layers in blocks
    pieces = _num_pieces(num_parts)
    piece = pool.shape[2] // pieces
    chunks = -(-piece // _CHUNK_WORDS)
    if packed.numel():
        _copy_units_kernel[(num_outer * num_inner * pieces * chunks,)](
            pool, packed, block_ids, num_inner, pool.shape[1], chunks, part * piece,
            PIECES=pieces, PIECE=piece, PACKED_PIECE=packed_unit // pieces, BLOCK=_CHUNK_WORDS,
            UNPACKS=unpacks, BY_BLOCK=by_block, num_warps=4,
        )  # fmt: skip


@jit_for_any("num_inner")
def _copy_units_kernel(
    pool_ptr: tl.tensor, packed_ptr: tl.tensor, ids_ptr: tl.tensor, num_inner: tl.tensor,
    num_blocks: tl.tensor, chunks: tl.tensor, begin: tl.tensor, PIECES: tl.constexpr,
    PIECE: tl.constexpr, PACKED_PIECE: tl.constexpr, BLOCK: tl.constexpr, UNPACKS: tl.constexpr,
    BY_BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    program = tl.program_id(0)
    packed_piece = (program // chunks).to(tl.int64)
    packed_unit = packed_piece // PIECES
    if BY_BLOCK:
        layer = packed_unit % num_inner
        place = packed_unit // num_inner
    else:
        layer = packed_unit // num_inner
        place = packed_unit % num_inner
    block_id = tl.load(ids_ptr + place).to(tl.int64)
    pool_unit = layer * num_blocks + block_id
    pool_piece = pool_unit * PIECES + packed_piece % PIECES
    column = program % chunks * BLOCK + tl.arange(0, BLOCK)
    mask = column < PIECE
    pool_words = pool_ptr + pool_piece * PIECE + column
    packed_words = packed_ptr + packed_piece * PACKED_PIECE + begin + column
    if UNPACKS:
        tl.store(pool_words, tl.load(packed_words, mask=mask), mask=mask)
    else:
        tl.store(packed_words, tl.load(pool_words, mask=mask), mask=mask)
