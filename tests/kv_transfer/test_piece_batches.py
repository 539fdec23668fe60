"""The pieces of a message are cut into calls of the kernel, and no byte is lost or moved twice."""

from __future__ import annotations

import numpy as np
import pytest

from kv_transfer.transports.piece_batches import after_first, batches


def pieces_of(sizes: list[int]) -> list[np.ndarray[tuple[int], np.dtype[np.uint8]]]:
    whole = np.arange(sum(sizes), dtype=np.uint64).astype(np.uint8)
    return np.split(whole, np.cumsum(sizes)[:-1].tolist())


@pytest.mark.parametrize(
    "sizes", [[5], [3, 0, 4], [600_000, 10, 600_000], [1] * 3000, [200_000] * 9]
)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_batches_are_the_front_of_the_pieces_and_fit_one_call(
    sizes: list[int], share: float
) -> None:
    pieces = pieces_of(sizes)
    num_bytes = int(sum(sizes) * share)
    found = list(batches(pieces, num_bytes))
    together = [piece for batch, _ in found for piece in batch]
    expected = np.concatenate(pieces)[:num_bytes]
    assert np.array_equal(np.concatenate([expected[:0], *together]), expected)
    for batch, size in found:
        assert size == sum(piece.nbytes for piece in batch)
        assert len(batch) == 1 or (size <= 512 * 1024 and len(batch) <= 1024)
    assert all(piece.nbytes for piece in together)


@pytest.mark.parametrize("num_bytes", [0, 1, 4, 5, 9, 12])
def test_a_call_that_moved_a_part_is_followed_by_one_for_the_rest(num_bytes: int) -> None:
    pieces = pieces_of([4, 1, 0, 7])
    left = after_first(pieces, num_bytes)
    whole = np.concatenate(pieces)
    assert np.array_equal(np.concatenate([whole[:0], *left]), whole[num_bytes:])
