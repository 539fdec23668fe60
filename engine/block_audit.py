"""Whether the block manager's books balance. Each check raises `BlockAccountingError`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.prefix_cache import BlockAccountingError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Sequence as SequenceOf

    from engine.prefix_cache import Block
    from engine.sequence import Sequence


def check_counts(blocks: SequenceOf[Block], tables: Iterable[SequenceOf[int]]) -> None:
    """Every reference that a block counts is in one of the tables."""
    counts = [0] * len(blocks)
    for table in tables:
        for block_id in table:
            counts[block_id] += 1
    for block, count in zip(blocks, counts, strict=True):
        if block.ref_count != count:
            raise BlockAccountingError(
                f"Block {block.block_id} counts {block.ref_count} references of {count}."
            )


def check_sequence(sequence: Sequence, block_size: int) -> None:
    table = sequence.block_table
    if len(set(table)) != len(table):
        raise BlockAccountingError(f"{sequence!r} has a block twice.")
    if sequence.num_computed_tokens > len(table) * block_size:
        raise BlockAccountingError(f"{sequence!r} has computed beyond its blocks.")


def check_states(
    blocks: SequenceOf[Block], free: SequenceOf[Block], parked: SequenceOf[Block]
) -> None:
    """Every block is free, cached or referenced, and only one of these."""
    referenced = [block for block in blocks if block.ref_count > 0]
    total = len(free) + len(parked) + len(referenced)
    if total != len(blocks) or len({*free, *parked, *referenced}) != total:
        raise BlockAccountingError(
            f"{len(free)} free + {len(parked)} cached + {len(referenced)} referenced blocks "
            f"are not {len(blocks)}."
        )
    if any(block.block_hash is not None for block in free):
        raise BlockAccountingError("A free block can be hit.")
