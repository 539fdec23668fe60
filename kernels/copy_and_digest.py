"""Packs and unpacks KV blocks and takes their digests in the same pass over the bytes.

What `copy_blocks` and `block_digest` do one after the other, with the same results: a hand-off
needs both, on both sides, and reading each byte once leaves more of the memory to the model.

`pools` are the parts of one pool, as `copy_blocks` has them: one, or those of all ranks of a model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.block_digest import block_digests, multipliers_of
from kernels.copy_blocks import pack_blocks, unpack_blocks
from kernels.dispatch import jit_for_any, num_multiprocessors, runs_triton, tl

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

# Words that one program copies and multiplies; their multipliers stay in its registers.
_CHUNK_WORDS = 2048
# Enough for a link to another GPU, and for half of this GPU's memory; more would leave the kernels
# of the model less room.
_PROGRAMS_PER_MULTIPROCESSOR = 1


def pack_and_digest(
    out: torch.Tensor,
    pools: Sequence[torch.Tensor],
    layer_start: int,
    num_layers: int,
    block_ids: torch.Tensor,
    num_ids: int,
    digests: torch.Tensor | None,
) -> None:
    """Copies as `pack_blocks` of each part; the digest of `out[l, i]` is added to
    `digests[l * num_ids + i]`.

    block_ids: int64, the first `num_ids` count. out: uint8, contiguous; its front is taken as
    `[num_layers, num_ids, unit_bytes]`, of whole units. digests: int64, on the same device, the
    first `num_layers * num_ids` zero before; None: no digests. Parts of units start at multiples
    of 4 bytes.
    """
    if runs_triton(out) and digests is not None:
        _move(pools, layer_start, num_layers, block_ids, num_ids, out, digests, unpacks=False)
        return
    units, ids = _front(pools, out, num_layers, num_ids), block_ids[:num_ids]
    for part, pool in enumerate(pools):
        pack_blocks(pool, layer_start, num_layers, ids, units, part=part, num_parts=len(pools))
    _add_digests(digests, units)


def unpack_and_digest(
    src: torch.Tensor,
    pools: Sequence[torch.Tensor],
    layer_start: int,
    num_layers: int,
    block_ids: torch.Tensor,
    num_ids: int,
    digests: torch.Tensor | None,
) -> None:
    """Copies as `unpack_blocks` to each part; `src` and digests as `out` and digests there. `src`
    may be the memory of another GPU, mapped: it is read once."""
    if runs_triton(src) and digests is not None:
        _move(pools, layer_start, num_layers, block_ids, num_ids, src, digests, unpacks=True)
        return
    units, ids = _front(pools, src, num_layers, num_ids), block_ids[:num_ids]
    for part, pool in enumerate(pools):
        unpack_blocks(units, pool, layer_start, num_layers, ids, part=part, num_parts=len(pools))
    _add_digests(digests, units)


def _front(
    pools: Sequence[torch.Tensor], packed: torch.Tensor, num_layers: int, num_ids: int
) -> torch.Tensor:
    unit_bytes = len(pools) * pools[0].shape[2]
    front = packed.view(-1)[: num_layers * num_ids * unit_bytes]
    return front.view(num_layers, num_ids, unit_bytes)


def _add_digests(digests: torch.Tensor | None, units: torch.Tensor) -> None:
    if digests is not None:
        num_units = units.shape[0] * units.shape[1]
        digests[:num_units] += block_digests(units, num_units)


def _move(
    pools: Sequence[torch.Tensor],
    layer_start: int,
    num_layers: int,
    block_ids: torch.Tensor,
    num_ids: int,
    packed: torch.Tensor,
    digests: torch.Tensor,
    *,
    unpacks: bool,
) -> None:
    """Tensors go to the kernel as they are: a view of one takes longer than it copies."""
    num_units = num_layers * num_ids
    num_parts, (_, num_blocks, part_bytes) = len(pools), pools[0].shape
    assert num_units * num_parts * part_bytes <= packed.numel()
    assert num_ids <= block_ids.numel()
    assert num_units <= digests.numel()
    if num_units == 0:
        return
    num_words = num_parts * part_bytes // 4
    pieces = 1 if num_parts == 1 else 2  # stretches of a part that stay together when packed
    piece = part_bytes // 4 // pieces
    chunks = -(-piece // _CHUNK_WORDS)
    programs = _PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors(packed.device)
    units_per_program = max(1, num_units * pieces * chunks // programs)
    grid = (pieces * chunks * -(-num_units // units_per_program),)
    multipliers = multipliers_of(num_words, packed.device)
    for part, pool in enumerate(pools):
        _move_kernel[grid](
            pool, packed, block_ids, multipliers, digests,
            layer_start, num_ids, num_blocks, num_units, units_per_program, chunks,
            PIECES=pieces, PIECE=piece, PACKED_PIECE=num_words // pieces, BEGIN=part * piece,
            BLOCK=_CHUNK_WORDS, UNPACKS=unpacks, num_warps=4,
        )  # fmt: skip


@jit_for_any("layer_start", "num_ids", "num_units", "units_per_program")
def _move_kernel(
    pool_ptr: tl.tensor, packed_ptr: tl.tensor, ids_ptr: tl.tensor, multipliers_ptr: tl.tensor,
    digests_ptr: tl.tensor, layer_start: tl.tensor, num_ids: tl.tensor, num_blocks: tl.tensor,
    num_units: tl.tensor, units_per_program: tl.tensor, chunks: tl.tensor, PIECES: tl.constexpr,
    PIECE: tl.constexpr, PACKED_PIECE: tl.constexpr, BEGIN: tl.constexpr, BLOCK: tl.constexpr,
    UNPACKS: tl.constexpr,
) -> None:  # fmt: skip
    pool_words = pool_ptr.to(tl.pointer_type(tl.int32))
    packed_words = packed_ptr.to(tl.pointer_type(tl.int32))
    columns = chunks * PIECES
    program = tl.program_id(0)
    piece = program % columns // chunks
    word = program % chunks * BLOCK + tl.arange(0, BLOCK)
    mask = word < PIECE
    packed_word = piece * PACKED_PIECE + BEGIN + word
    multipliers = tl.load(multipliers_ptr + packed_word, mask=mask, other=0)
    first_unit = program // columns * units_per_program
    for unit in range(first_unit, tl.minimum(first_unit + units_per_program, num_units)):
        block_id = tl.load(ids_ptr + unit % num_ids)
        pool_unit = tl.cast(layer_start + unit // num_ids, tl.int64) * num_blocks + block_id
        in_pool = pool_words + pool_unit * (PIECES * PIECE) + piece * PIECE + word
        in_packed = packed_words + tl.cast(unit, tl.int64) * (PIECES * PACKED_PIECE) + packed_word
        if UNPACKS:
            words = tl.load(in_packed, mask=mask, other=0)
            tl.store(in_pool, words, mask=mask)
        else:
            words = tl.load(in_pool, mask=mask, other=0)
            tl.store(in_packed, words, mask=mask)
        unsigned = words.to(tl.int64) & 0xFFFFFFFF
        tl.atomic_add(digests_ptr + unit, tl.sum(unsigned * multipliers, axis=0), sem="relaxed")
