"""Whose a mark is, when requests come one at a time."""

from __future__ import annotations

import pytest

from benchmarks.kv_trace_served import requests_of
from kv_transfer.trace import Mark


def marks(*seen: tuple[str, float]) -> list[Mark]:
    return [Mark(point, 0, 0, micros * 1e-6) for point, micros in seen]


def test_a_request_ends_with_the_first_token_behind_its_start_and_counts_from_its_last_frame() -> (
    None
):
    first = marks(("s.slot", 5), ("r.verified", 8), ("s.slot", 10), ("r.verified", 30))
    first += marks(("d.engine", 40), ("d.launch", 47), ("d.launch", 60), ("d.token", 70))
    second = marks(("d.launch", 75), ("d.token", 90), ("s.slot", 100), ("d.launch", 101))
    second += marks(("d.engine", 120), ("d.launch", 121), ("d.token", 125))
    found = requests_of([*second, *first])  # each process has a file of its own
    assert [points["d.launch"] for points in found] == pytest.approx([37, 21])
    assert [points["d.token"] for points in found] == pytest.approx([60, 25])
    assert found[0]["r.verified"] == pytest.approx(20)
    assert "r.verified" not in found[1], "it is the first request's"


def test_what_was_all_there_already_has_no_frame_to_count_from() -> None:
    seen = marks(("r.start", 1), ("d.engine", 2), ("d.launch", 3), ("d.token", 4))
    assert requests_of(seen) == []
