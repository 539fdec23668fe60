"""The line of tokens: exact at its ends and between them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.draw import draw_any, draw_filtered, heaviest

LAST_POINT = 1.0 - 2.0**-53


def column(*values: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype).unsqueeze(1)


def filtered(
    weights: list[float], point: float, *, top_k: int = 0, top_p: float = 1.0, candidates: int = 99
) -> tuple[int, bool]:
    token_ids, is_enough = draw_filtered(
        torch.tensor([weights]),
        column(point),
        column(top_k, dtype=torch.int64),
        column(top_p),
        candidates,
    )
    return int(token_ids), bool(is_enough)


@pytest.mark.parametrize(
    ("point", "expected"),
    [(0.0, 1), (0.4999, 1), (0.5, 3), (0.7499, 3), (0.75, 4), (LAST_POINT, 4)],
)
def test_a_point_falls_on_the_token_that_covers_it(point: float, expected: int) -> None:
    """Tokens 0, 2 and 5 have no length: not even the ends of the line fall on them."""
    weights = torch.tensor([[0.0, 1.0, 0.0, 0.5, 0.5, 0.0]])
    assert int(draw_any(weights, column(point))) == expected


@given(st.integers(1, 2**20))
def test_the_last_point_is_on_the_line_whatever_its_length(unit: int) -> None:
    weights = torch.tensor([[1.0, unit / 2**20, 0.0]])
    assert int(draw_any(weights, column(LAST_POINT))) == 1
    assert filtered(weights[0].tolist(), LAST_POINT)[0] == 1


def test_a_row_that_is_not_a_number_picks_some_token_of_the_vocabulary() -> None:
    weights = torch.full((1, 4), float("nan"))
    assert 0 <= int(draw_any(weights, column(0.5))) < 4
    assert 0 <= filtered([float("nan")] * 4, 0.5, top_k=2)[0] < 4


def test_a_nucleus_that_needs_a_hair_more_takes_one_token_more() -> None:
    equal = [1.0, 1.0, 1.0, 1.0]
    assert filtered(equal, LAST_POINT, top_p=0.25) == (0, True)
    assert filtered(equal, LAST_POINT, top_p=0.25 + 2.0**-45) == (1, True)


def test_too_few_candidates_are_noticed_and_enough_give_the_same_token() -> None:
    weights = [0.1, 0.9, 0.3, 1.0, 0.2]
    for candidates in range(1, 6):
        token_id, is_enough = filtered(weights, 0.99, top_p=0.8, candidates=candidates)
        assert is_enough == (candidates >= 3)
        assert not is_enough or token_id == 2
    for candidates in range(1, 6):
        token_id, is_enough = filtered(weights, 0.99, top_k=4, candidates=candidates)
        assert is_enough == (candidates >= 4)
        assert not is_enough or token_id == 4


floats = st.floats(width=32, allow_nan=False)


@given(st.lists(floats, min_size=1, max_size=30), st.integers(1, 30))
def test_the_heaviest_are_ordered_like_the_floats_then_by_id(
    values: list[float], count: int
) -> None:
    row = torch.tensor([values], dtype=torch.float32) + 0.0  # no -0.0, which is less than 0.0
    count = min(count, len(values))
    order = sorted(range(len(values)), key=lambda index: (-float(row[0, index]), index))
    assert heaviest(row, count)[0].tolist() == order[:count]
