"""What one part breaks over is told, and stays its own."""

from __future__ import annotations

import logging

import pytest

from cluster.isolation import isolated, tried

logger = logging.getLogger(__name__)


def test_an_error_is_logged_with_whose_it_is(caplog: pytest.LogCaptureFixture) -> None:
    def part() -> None:
        raise KeyError("gone")

    assert not isolated(part, "a part broke", logger, extra={"sequence_id": "s-1"})
    [record] = caplog.records
    assert record.message == "a part broke"
    assert record.name == __name__
    assert record.exc_info is not None
    assert vars(record)["sequence_id"] == "s-1"


def test_what_goes_well_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert isolated(lambda: False, "a part broke", logger)
    assert not caplog.records


def test_the_end_of_the_process_passes() -> None:
    def part() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        isolated(part, "a part broke", logger)


def test_who_asks_gets_what_a_part_gives_or_what_it_broke_over() -> None:
    error = KeyError("gone")

    def part() -> None:
        raise error

    assert tried(lambda: 7) == 7
    assert tried(part) is error
