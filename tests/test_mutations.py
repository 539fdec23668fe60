"""The protective lines of the bug catalogue are where it says, and each has a test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutations.catalogue import ROWS
from tests.mutations.row import Mutation, Row

ROOT = Path(__file__).resolve().parents[1]


def test_every_row_of_the_catalogue_is_there() -> None:
    assert len({row.bug for row in ROWS}) == 31


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.reports)
def test_each_protective_line_stands_once_and_its_test_exists(row: Row) -> None:
    for mutation in row.mutations:
        text = (ROOT / mutation.file).read_text()
        assert mutation.applied_to(text) != text
        path, _, test = mutation.test.partition("::")
        assert f"def {test.partition('[')[0]}(" in (ROOT / path).read_text()


def test_a_line_that_is_not_there_is_said() -> None:
    with pytest.raises(LookupError, match="0 times"):
        Mutation("kv_transfer/lease.py", "no such line", "", "").applied_to("text")
