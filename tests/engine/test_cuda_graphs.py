"""Which graph runs how many sequences; that it computes the same is tested on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest
import torch

from engine.batch import BatchShape, InputBuffer
from engine.cuda_graphs import DecodeGraphs, capture_sizes

if TYPE_CHECKING:
    from engine.models.decoder import Decoder


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
    graphs = DecodeGraphs(
        cast("Decoder", None),  # not asked before a capture
        (),
        InputBuffer(BatchShape(20, 20, 20, 16), torch.device("cpu")),
        max_num_seqs=20,
        table_width=16,
        device=torch.device("cpu"),
    )
    assert [graphs.padded(n) for n in range(1, 21)] == [
        *(1, 2, 4, 4, 8, 8, 8, 8),
        *[16] * 8,
        *[20] * 4,
    ]


def test_inputs_lie_at_the_same_place_however_long_the_sequences_are() -> None:
    """A captured graph reads fixed addresses; only block tables may move."""
    buffer = InputBuffer(BatchShape(64, 8, 8, 512), torch.device("cpu"))
    narrow = buffer.device_views(BatchShape(4, 4, 0, 16))
    wide = buffer.device_views(BatchShape(4, 4, 0, 512))
    for ours, theirs in zip(narrow[:-1], wide[:-1], strict=True):
        assert ours.data_ptr() == theirs.data_ptr()
        assert ours.shape == theirs.shape
