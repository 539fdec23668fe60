"""Two ranks over the same pairs of buffers, each as far ahead as their meetings allow."""

from __future__ import annotations

import pytest
import torch

from engine.tensor_parallel.large_sums import LargeSums

SIZE = 64


def two_ranks() -> list[LargeSums]:
    buffers = [torch.full((2, SIZE), float("nan")) for _ in range(2)]
    return [LargeSums(rank, buffers) for rank in range(2)]


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_rank_that_is_ahead_spoils_no_sum(ahead: int) -> None:
    """It may put the next summand, in place, before the other one has read this one."""
    ranks, behind = two_ranks(), 1 - ahead
    streams = [torch.randn(4, 16) for _ in ranks]
    for rank, stream in zip(ranks, streams, strict=True):
        rank.put(stream)
    for _ in range(5):
        wanted = streams[0] + streams[1]
        first = ranks[ahead].add(wanted.shape)
        assert torch.equal(first, wanted)
        summand = first.mul_(0.5)
        ranks[ahead].put(summand)
        second = ranks[behind].add(wanted.shape)
        assert torch.equal(second, wanted)
        ranks[behind].put(torch.full_like(second, 3.0))
        streams = [wanted * 0.5, torch.full_like(wanted, 3.0)]


def test_a_summand_made_in_the_stream_is_where_it_belongs() -> None:
    ranks = two_ranks()
    for rank in ranks:
        rank.put(torch.ones(SIZE))
    stream = ranks[0].add(torch.Size([SIZE]))
    place = ranks[0]._buffers[0][ranks[0]._turn]
    assert stream.data_ptr() == place.data_ptr()


@pytest.mark.parametrize(
    ("size", "dtype", "fits"),
    [(SIZE, torch.float32, True), (SIZE + 8, torch.float32, False), (60, torch.float32, False),
     (SIZE, torch.bfloat16, False)],
)  # fmt: skip
def test_what_it_holds(size: int, dtype: torch.dtype, fits: bool) -> None:
    assert two_ranks()[0].holds(torch.zeros(size, dtype=dtype)) == fits
