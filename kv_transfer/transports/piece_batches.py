"""The pieces of a message, as many at a time as one call of the kernel moves."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kv_transfer.transports.base import Piece

_BATCH_BYTES = 512 * 1024  # they stay in the second-level cache for who examines them
_MAX_PIECES = 1024  # IOV_MAX


def batches(pieces: Sequence[Piece], num_bytes: int) -> Iterator[tuple[list[Piece], int]]:
    """The first `num_bytes` of the pieces, some at a time, with their size."""
    batch: list[Piece] = []
    taken = 0
    for piece in pieces:
        size = piece.nbytes
        if size > num_bytes:
            piece, size = piece[:num_bytes], num_bytes
        if not size:
            continue
        if batch and (taken + size > _BATCH_BYTES or len(batch) == _MAX_PIECES):
            yield batch, taken
            batch, taken = [], 0
        batch.append(piece)
        taken += size
        num_bytes -= size
    if batch:
        yield batch, taken


def after_first(pieces: list[Piece], num_bytes: int) -> list[Piece]:
    """What follows the first `num_bytes`."""
    for index, piece in enumerate(pieces):
        if num_bytes < piece.nbytes:
            return [piece[num_bytes:], *pieces[index + 1 :]]
        num_bytes -= piece.nbytes
    return []
