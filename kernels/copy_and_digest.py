"""Packs and unpacks KV blocks, takes their digests, and seals or compares these, in one kernel.

What `copy_blocks`, `block_digest` and sealing do one after the other, with the same results: a
hand-off needs all of it, on both sides. Reading each byte once leaves more of the memory to the
model, and a second launch costs the host more than a small frame costs the device.

`pools` are the parts of one pool, as `copy_blocks` has them: one, or those of all ranks of a model.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from kernels.block_digest import block_digests, multipliers_of
from kernels.copy_blocks import pack_blocks, unpack_blocks
from kernels.dispatch import (
    jit_for_any,
    next_power_of_two,
    num_multiprocessors,
    runs_triton,
    tl,
)
from kernels.seal_digests import MAX_STRETCHES, num_right_on_host, seal_on_host, seal_units

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from kernels.seal_digests import Places, Sums


class _Shape(NamedTuple):
    """words: of a unit, that one program copies and multiplies; their multipliers stay in its
    registers. num_stages: how many pieces of so many words are on their way."""

    words: int
    num_warps: int
    num_stages: int


# One program a multiprocessor; more would leave the kernels of the model less room. On an H200 it
# packs 128 MiB in 84 us (77 without digests); four warps with 2048 words took 154.
_PACKING = _Shape(words=8192, num_warps=8, num_stages=1)
# The products of a decode step leave little of a multiprocessor, so a program is small, and another
# GPU's memory is far away. On an H200 two such moves beside each other read 373 GB/s (374 without
# digests), one alone 353; two of two warps and 1024 words read 370.
_UNPACKING = _Shape(words=512, num_warps=1, num_stages=4)
_LEAST_WORDS = 1024  # that eight warps can share
_SEALED_AT_ONCE = 128  # a thread each


def pack_and_seal(
    slot: torch.Tensor,
    pools: Sequence[torch.Tensor],
    block_ids: torch.Tensor,
    places: Places,
    sums: Sums | None,
) -> None:
    """Copies the blocks of `places` to the front of `slot`, as `pack_blocks` does of each part, and
    writes their sealed digests behind them.

    slot: uint8, contiguous; its front is taken as `[num_layers, num_positions, unit_bytes]`, of
    whole units, a multiple of 8 bytes in all. block_ids: int64, those count that do of
    `places.positions`; none twice. sums: on the same device; None: no digests. Parts of units start
    at multiples of 4 bytes.
    """
    if runs_triton(slot):
        _move(slot, pools, block_ids, places, sums, None)
        return
    units, ids = _front(pools, slot, places), places.of(block_ids)
    start, count = places.layer_start, places.num_layers
    for part, pool in enumerate(pools):
        pack_blocks(pool, start, count, ids, units, part=part, num_parts=len(pools))
    if sums is not None:
        digests = block_digests(units, places.num_units)
        seal_on_host(digests, places, _behind(slot, units, places))


def unpack_and_check(
    slot: torch.Tensor,
    pools: Sequence[torch.Tensor],
    block_ids: torch.Tensor,
    places: Places,
    sums: Sums | None,
    num_right: torch.Tensor,
) -> None:
    """Copies the front of `slot` to blocks, as `unpack_blocks` does to each part, and counts the
    units whose digests, sealed, are the ones behind them.

    slot: as there; it may be the memory of another GPU, mapped: it is read once. num_right: that of
    a `Verdict` that was reset.
    """
    if runs_triton(slot):
        _move(slot, pools, block_ids, places, sums, num_right)
        return
    units, ids = _front(pools, slot, places), places.of(block_ids)
    start, count = places.layer_start, places.num_layers
    for part, pool in enumerate(pools):
        unpack_blocks(units, pool, start, count, ids, part=part, num_parts=len(pools))
    if sums is not None:
        digests = block_digests(units, places.num_units)
        num_right[0] = num_right_on_host(digests, places, _behind(slot, units, places))


def _front(pools: Sequence[torch.Tensor], slot: torch.Tensor, places: Places) -> torch.Tensor:
    unit_bytes = len(pools) * pools[0].shape[2]
    front = slot.view(-1)[: places.num_units * unit_bytes]
    return front.view(places.num_layers, places.num_positions, unit_bytes)


def _behind(slot: torch.Tensor, units: torch.Tensor, places: Places) -> torch.Tensor:
    return slot[units.numel() : units.numel() + 8 * places.num_units]


def _move(
    slot: torch.Tensor,
    pools: Sequence[torch.Tensor],
    block_ids: torch.Tensor,
    places: Places,
    sums: Sums | None,
    num_right: torch.Tensor | None,
) -> None:
    for args, named in calls_of(slot, pools, block_ids, places, sums, num_right):
        split = split_of(pools, places.num_units, unpacks=num_right is not None)
        move_kernel[(split.num_programs,)](*args, **named)


def calls_of(
    slot: torch.Tensor,
    pools: Sequence[torch.Tensor],
    block_ids: torch.Tensor,
    places: Places,
    sums: Sums | None,
    num_right: torch.Tensor | None,
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What the kernel is called with for each part. Tensors as they are: a view of one takes longer
    than it copies."""
    check_extents(slot, pools, block_ids, places, sums)
    if places.num_units == 0:
        return
    num_parts, part_bytes = len(pools), pools[0].shape[2]
    unpacks = num_right is not None
    numbers = numbers_of(places, pools, split_of(pools, places.num_units, unpacks=unpacks))
    multipliers = multipliers_of(num_parts * part_bytes // 4, slot.device)
    adding = (slot, slot) if sums is None else (sums.digests, sums.num_added)
    pieces, piece, shape, columns = _cut(num_parts, part_bytes, unpacks=unpacks)
    for part, pool in enumerate(pools):
        args = (
            pool, slot, block_ids, multipliers, *adding,
            slot if num_right is None else num_right, places.positions, *numbers,
        )  # fmt: skip
        yield args, {
            "COLUMNS": columns, "PIECES": pieces, "PIECE": piece,
            "PACKED_PIECE": num_parts * piece, "BEGIN": part * piece, "BLOCK": shape.words,
            "STAGES": shape.num_stages, "SEALED": _SEALED_AT_ONCE, "UNPACKS": unpacks,
            "DIGESTS": sums is not None, "num_warps": shape.num_warps,
        }  # fmt: skip


def check_extents(
    slot: torch.Tensor,
    pools: Sequence[torch.Tensor],
    block_ids: torch.Tensor,
    places: Places,
    sums: Sums | None,
) -> None:
    """That a move stays within the memory of these."""
    num_units = places.num_units
    units_bytes = num_units * len(pools) * pools[0].shape[2]
    assert units_bytes % 8 == 0
    assert units_bytes + (0 if sums is None else 8 * num_units) <= slot.numel()
    assert places.first + places.num_positions <= min(block_ids.numel(), places.positions.numel())
    assert sums is None or num_units <= sums.digests.numel()


class Split(NamedTuple):
    """How a move is shared out. num_adding: programs, of all parts, that work on one stretch."""

    num_programs: int
    units_per_program: int
    num_adding: int


def split_of(pools: Sequence[torch.Tensor], num_units: int, *, unpacks: bool) -> Split:
    return _split(num_units, len(pools), pools[0].shape[2], pools[0].device, unpacks)


@lru_cache(maxsize=1024)
def _split(
    num_units: int, num_parts: int, part_bytes: int, device: torch.device, unpacks: bool
) -> Split:
    *_, columns = _cut(num_parts, part_bytes, unpacks=unpacks)
    most_stretches = max(1, min(num_multiprocessors(device) // columns, MAX_STRETCHES))
    units_per_program = -(-num_units // most_stretches)
    num_stretches = -(-num_units // units_per_program)
    return Split(columns * num_stretches, units_per_program, columns * num_parts)


def _cut(num_parts: int, part_bytes: int, *, unpacks: bool) -> tuple[int, int, _Shape, int]:
    """Stretches of a part that stay together when packed, words of each, what a program copies at
    a time, and how many of these a part has."""
    pieces = 1 if num_parts == 1 else 2
    piece = part_bytes // 4 // pieces
    shape = _UNPACKING if unpacks else _PACKING
    words = min(shape.words, max(_LEAST_WORDS, next_power_of_two(piece)))
    shape = shape._replace(words=words)
    return pieces, piece, shape, pieces * -(-piece // shape.words)


def numbers_of(places: Places, pools: Sequence[torch.Tensor], split: Split) -> tuple[int, ...]:
    """What is behind the tensors of a call."""
    return (
        places.seed, places.layer_start, places.num_positions, places.first, pools[0].shape[1],
        places.num_units, split.units_per_program, split.num_adding,
    )  # fmt: skip


@jit_for_any(
    "seed",
    "layer_start",
    "num_ids",
    "first_id",
    "num_blocks",
    "num_units",
    "units_per_program",
    "num_adding",
)
def move_kernel(
    pool_ptr: tl.tensor, slot_ptr: tl.tensor, ids_ptr: tl.tensor, multipliers_ptr: tl.tensor,
    digests_ptr: tl.tensor, num_added_ptr: tl.tensor, num_right_ptr: tl.tensor,
    positions_ptr: tl.tensor, seed: tl.tensor, layer_start: tl.tensor, num_ids: tl.tensor,
    first_id: tl.tensor, num_blocks: tl.tensor, num_units: tl.tensor,
    units_per_program: tl.tensor, num_adding: tl.tensor, COLUMNS: tl.constexpr,
    PIECES: tl.constexpr, PIECE: tl.constexpr, PACKED_PIECE: tl.constexpr, BEGIN: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, SEALED: tl.constexpr, UNPACKS: tl.constexpr,
    DIGESTS: tl.constexpr,
) -> None:  # fmt: skip
    """`num_adding` programs, of all parts, work on one stretch of `units_per_program` units; the
    last of them seals it."""
    pool_words = pool_ptr.to(tl.pointer_type(tl.int32))
    packed_words = slot_ptr.to(tl.pointer_type(tl.int32))
    column = tl.program_id(0) % COLUMNS
    stretch = tl.program_id(0) // COLUMNS
    CHUNKS: tl.constexpr = COLUMNS // PIECES
    piece = column // CHUNKS
    word = column % CHUNKS * BLOCK + tl.arange(0, BLOCK)
    mask = word < PIECE
    packed_word = piece * PACKED_PIECE + BEGIN + word
    if DIGESTS:
        multipliers = tl.load(multipliers_ptr + packed_word, mask=mask, other=0)
    first = stretch * units_per_program
    end = tl.minimum(first + units_per_program, num_units)
    for unit in tl.range(first, end, num_stages=STAGES):
        block_id = tl.load(ids_ptr + first_id + unit % num_ids)
        pool_unit = tl.cast(layer_start + unit // num_ids, tl.int64) * num_blocks + block_id
        in_pool = pool_words + pool_unit * (PIECES * PIECE) + piece * PIECE + word
        in_packed = packed_words + tl.cast(unit, tl.int64) * (PIECES * PACKED_PIECE) + packed_word
        if UNPACKS:
            words = tl.load(in_packed, mask=mask, other=0)
            tl.store(in_pool, words, mask=mask)
        else:
            words = tl.load(in_pool, mask=mask, other=0)
            tl.store(in_packed, words, mask=mask)
        if DIGESTS:
            unsigned = words.to(tl.int64) & 0xFFFFFFFF
            digest = tl.sum(unsigned * multipliers, axis=0)
            tl.atomic_add(digests_ptr + unit, digest, sem="relaxed")
    if DIGESTS:
        tl.debug_barrier()
        if tl.atomic_add(num_added_ptr + stretch, 1, sem="acq_rel") == num_adding - 1:
            tl.store(num_added_ptr + stretch, 0)
            units = tl.cast(num_units, tl.int64) * (PIECES * PACKED_PIECE)
            behind = (packed_words + units).to(tl.pointer_type(tl.int64))
            seal_units(
                digests_ptr, behind, num_right_ptr + stretch, positions_ptr + first_id, seed,
                layer_start, num_ids, first, end, CHECKS=UNPACKS, BLOCK=SEALED,
            )  # fmt: skip
