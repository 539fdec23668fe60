"""Which graph runs how many sequences; that it computes the same is tested on a GPU."""

from __future__ import annotations

import pytest
import torch

from engine.cuda_graphs import DecodeGraphs, capture_sizes


@pytest.mark.parametrize(
    ("max_num_seqs", "sizes"),
    [
        (1, [1]),
        (3, [1, 2, 3]),
        (16, [1, 2, 4, 8, 16]),
        (20, [1, 2, 4, 8, 16, 20]),
        (32, [1, 2, 4, 8, 16, 24, 32]),
    ],
)
def test_sizes_grow_to_the_most_sequences(max_num_seqs: int, sizes: list[int]) -> None:
    assert capture_sizes(max_num_seqs) == sizes


def test_a_step_takes_the_smallest_graph_that_holds_it() -> None:
    def forward(num_rows: int) -> torch.Tensor:
        raise AssertionError("not asked before a capture")

    def draw(hidden: torch.Tensor, only_best: bool) -> None:
        raise AssertionError("not asked before a capture")

    graphs = DecodeGraphs(forward, draw, sizes=capture_sizes(20), device=torch.device("cpu"))
    assert [graphs.padded(n) for n in range(1, 21)] == [
        *(1, 2, 4, 4, 8, 8, 8, 8),
        *[16] * 8,
        *[20] * 4,
    ]
