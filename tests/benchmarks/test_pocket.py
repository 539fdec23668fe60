"""What `make bench` promises before it starts."""

from __future__ import annotations

from benchmarks.pocket import BUSY_LOAD_PER_CORE, expectation


def test_who_waits_hears_how_long_and_that_a_busy_machine_compares_little() -> None:
    assert expectation(BUSY_LOAD_PER_CORE) == "about a minute on two cores"
    assert "load 3.2 on each core" in expectation(3.2)
    assert "compares little" in expectation(3.2)
