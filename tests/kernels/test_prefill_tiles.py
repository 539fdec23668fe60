from __future__ import annotations

import pytest
import torch

from kernels.prefill_tiles import PIECE, plan_tiles
from tests.kernels.conftest import entered

PLACES = ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)]


def pieces(
    query_lens: list[int], seq_lens: list[int], place: str, spare_tokens: int = 0
) -> list[tuple[int, ...]]:
    """What is planned: first token, queries, first position, sequence."""
    with entered(place) as device:
        starts = torch.tensor([0, *query_lens], device=device).cumsum(0).int()
        lengths = torch.tensor(seq_lens, dtype=torch.int32, device=device)
        tiles = plan_tiles(starts, lengths, sum(query_lens) + spare_tokens).tolist()
    count, *zeros = tiles[0]
    assert zeros == [0, 0, 0]
    return [tuple(row) for row in tiles[1 : count + 1]]


def expected(query_lens: list[int], seq_lens: list[int]) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    token = 0
    for sequence, (query_len, seq_len) in enumerate(zip(query_lens, seq_lens, strict=True)):
        found += [
            (token + row, min(PIECE, query_len - row), seq_len - query_len + row, sequence)
            for row in range(0, query_len, PIECE)
        ]
        token += query_len
    return found


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("query_lens", "seq_lens"),
    [
        ([1], [1]),
        ([128], [128]),
        ([1000], [1000]),
        ([300, 17, 128, 1], [300, 517, 129, 64]),
        ([127, 1, 128, 255, 129], [127, 900, 128, 300, 129]),
        ([5] * 70, list(range(5, 75))),
    ],
)
def test_every_query_is_in_one_piece_and_the_longest_come_first(
    place: str, query_lens: list[int], seq_lens: list[int]
) -> None:
    planned = pieces(query_lens, seq_lens, place)
    assert sorted(planned) == sorted(expected(query_lens, seq_lens))
    ends = [rows + position for _, rows, position, _ in planned]
    assert ends == sorted(ends, reverse=True)


@pytest.mark.parametrize("place", PLACES)
def test_padding_sequences_and_tokens_make_no_pieces(place: str) -> None:
    planned = pieces([20, 5, 0, 0], [30, 5, 0, 0], place, spare_tokens=300)
    assert planned == [(0, 20, 10, 0), (20, 5, 0, 1)]


def test_there_is_no_plan_without_sequences(device: torch.device) -> None:
    starts = torch.zeros(1, dtype=torch.int32, device=device)
    tiles = plan_tiles(starts, starts[:0], 0)
    assert tiles.tolist() == [[0, 0, 0, 0]]


def test_the_cpu_plans_no_pieces() -> None:
    lengths = torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="GPU only"):
        plan_tiles(torch.tensor([0, 1], dtype=torch.int32), lengths, 1)
