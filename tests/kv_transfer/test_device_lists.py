"""Lists on the device hold what was asked for, whatever was asked for before."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kv_transfer.device_lists import DeviceLists


@pytest.fixture
def lists(monkeypatch: pytest.MonkeyPatch) -> DeviceLists:
    """Of two that are kept; copies are made at once."""
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    return DeviceLists(torch.device("cpu"), 8, num_kept=2)


def equal_to(numbers: tuple[int, ...]) -> tuple[int, ...]:
    """Another object."""
    return (*numbers[:1], *numbers[1:])


def test_the_same_and_an_equal_list_are_found_again(lists: DeviceLists) -> None:
    numbers = (3, 1, 2)
    found = lists.get(numbers)
    assert found[:3].tolist() == [3, 1, 2]
    assert lists.get(numbers) is found
    assert lists.get(equal_to(numbers)) is found


def test_the_place_of_a_list_that_was_put_out_is_not_taken_for_it(lists: DeviceLists) -> None:
    """Though it is the same object, and was asked for a moment ago."""
    first, second, third = (1, 1), (2, 2), (3, 3)
    for _ in range(3):
        for numbers in (first, second, third):
            assert lists.get(numbers)[:2].tolist() == list(numbers)


def test_the_list_used_last_stays(lists: DeviceLists) -> None:
    first, second, third = (1, 1), (2, 2), (3, 3)
    kept = lists.get(first)
    lists.get(second)
    lists.get(equal_to(first))
    lists.get(third)
    assert lists.get(first) is kept
