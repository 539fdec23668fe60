"""By which names host memory knows the blocks of a sequence: full ones by their hash, the last one,
partly filled, by a name of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.prefix_hash import hash_blocks

if TYPE_CHECKING:
    from cluster.prefix_hash import BlockHash
    from engine.sequence import Sequence


def names_of(sequence: Sequence, block_size: int) -> list[BlockHash]:
    """Of the blocks that hold computed tokens."""
    sequence.extend_block_hashes()
    num_full = sequence.num_computed_tokens // block_size
    names = sequence.block_hashes[:num_full]
    is_decoding = sequence.num_computed_tokens == sequence.num_tokens - 1
    name = tail_of(sequence, block_size) if is_decoding else None
    return names if name is None else [*names, name]


def tail_of(sequence: Sequence, block_size: int) -> BlockHash | None:
    """The name of the last block of a sequence that lacks its last token alone: None if that
    block is full. Fewer tokens than a block has make other names than blocks have."""
    num_full, num_left = divmod(sequence.num_tokens - 1, block_size)
    if num_left == 0:
        return None
    first = num_full * block_size
    parent = sequence.block_hashes[num_full - 1] if num_full else sequence.root
    return hash_blocks(sequence.token_ids[first : first + num_left], num_left, parent)[0]
