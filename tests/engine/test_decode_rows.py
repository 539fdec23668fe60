"""Rows of decoding sequences: kept while they last, and tables that say what the lists say."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.decode_rows import DecodeRows
from engine.row_inputs import RowInputs
from tests.sequences import make_sequence

if TYPE_CHECKING:
    from engine.sequence import Sequence

CPU = torch.device("cpu")
BLOCK_SIZE = 4


def with_table(*table: int) -> Sequence:
    sequence = make_sequence(range(4 * len(table)))
    sequence.block_table = list(table)
    return sequence


def write(rows: DecodeRows, inputs: RowInputs) -> int:
    """Upload all changes; how many entries there were."""
    total = 0
    for part in inputs.split(rows.all_changes()):
        inputs.next_rows()
        num_entries = inputs.set_changes(part)
        inputs.upload(num_entries)
        total += num_entries
    return total


def test_sequences_keep_their_rows_and_newcomers_fill_the_gaps() -> None:
    rows = DecodeRows(4)
    a, b, c, d, e = (with_table(i) for i in range(5))
    assert rows.arrange([a, b, c, d])
    assert rows.sequences == [a, b, c, d]
    assert rows.arrange([a, c, d])  # the last one moves into the gap
    assert rows.sequences == [a, d, c]
    assert rows.arrange([e, a, c, d])
    assert rows.sequences == [a, d, c, e]
    same = rows.sequences
    assert not rows.arrange([e, a, c, d]), "asked in the scheduler's order, which is another"
    assert rows.sequences is same


def test_only_what_is_new_is_written() -> None:
    rows, inputs = DecodeRows(2), RowInputs(2, 8, CPU)
    first, second = with_table(5, 6, 7), with_table(1)
    rows.arrange([first, second])
    assert write(rows, inputs) == 4
    assert write(rows, inputs) == 0
    second.block_table.append(9)
    assert write(rows, inputs) == 1
    assert inputs.tables[:, :3].tolist() == [[5, 6, 7], [1, 9, 0]]


def test_growth_looks_only_at_rows_that_need_another_block() -> None:
    rows, inputs = DecodeRows(2), RowInputs(2, 8, CPU)
    first, second = with_table(5), with_table(1, 2)
    rows.arrange([first, second])
    write(rows, inputs)
    first.block_table.append(3)
    assert rows.growth(np.array([0, 1])) == []
    (change,) = rows.growth(np.array([1, 1]))
    assert change == (0, 1, [3])


def test_a_table_that_is_another_list_is_written_whole() -> None:
    """Preempted and back, a sequence has other blocks."""
    rows, inputs = DecodeRows(1), RowInputs(1, 8, CPU)
    sequence = with_table(7, 3)
    rows.arrange([sequence])
    write(rows, inputs)
    sequence.block_table = [0, 1]
    assert write(rows, inputs) == 2
    assert inputs.tables[0, :2].tolist() == [0, 1]


def test_a_table_that_somebody_else_has_overwritten_is_written_whole() -> None:
    rows, inputs = DecodeRows(3), RowInputs(3, 8, CPU)
    rows.arrange([with_table(7, 3), with_table(5), with_table(4)])
    write(rows, inputs)
    inputs.tables[:2] = 99
    rows.overwritten(2)
    assert write(rows, inputs) == 3
    assert inputs.tables[:, 0].tolist() == [7, 5, 4]


def test_more_entries_than_an_upload_holds_take_several() -> None:
    rows, inputs = DecodeRows(3), RowInputs(3, 64, CPU)
    inputs._max_entries = 10
    tables = [list(range(100 * i, 100 * i + 25)) for i in range(3)]
    sequences = [with_table(*table) for table in tables]
    rows.arrange(sequences)
    assert write(rows, inputs) == 75
    assert inputs.tables[:, :25].tolist() == tables


@pytest.mark.parametrize("max_rows", [1, 3, 4, 21])
def test_each_array_begins_where_kernels_take_it_without_another_compilation(
    max_rows: int,
) -> None:
    rows = RowInputs(max_rows, 16, CPU).device_rows
    first = rows.ends.data_ptr()
    assert all((array.data_ptr() - first) % 16 == 0 for array in rows)
    assert all(len(array) >= max_rows for array in rows)


def rows_by_looking_at_each(rows: list[Sequence], asked: list[Sequence]) -> list[Sequence]:
    """Who stays keeps a row below their number; the others take the free ones in order."""
    kept = {row: each for row, each in enumerate(rows[: len(asked)]) if each in asked}
    others = iter([each for each in asked if each not in kept.values()])
    return [kept[row] if row in kept else next(others) for row in range(len(asked))]


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 7))
def test_rows_of_any_arrivals_ends_and_preemptions_are_those_found_slowly(
    seed: int, most: int
) -> None:
    """As a scheduler asks: in order of arrival, where preempted ones come back to their place."""
    chance = random.Random(seed)
    rows = DecodeRows(most)
    in_order: list[Sequence] = []
    absent: set[Sequence] = set()
    last: list[Sequence] = []
    for step in range(60):
        if chance.random() < 0.2:
            in_order.append(with_table(step))
        if in_order and chance.random() < 0.15:
            in_order.remove(chance.choice(in_order))
        if in_order and chance.random() < 0.3:
            absent ^= {chance.choice(in_order)}
        asked = [each for each in in_order if each not in absent][:most]
        expected, same = rows_by_looking_at_each(rows.sequences, asked), rows.sequences
        assert rows.arrange(list(asked)) == (asked != last)
        assert rows.sequences == expected
        assert (rows.sequences is same) == (asked == last)
        last = asked


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 6))
def test_tables_on_the_device_always_say_what_the_lists_say(seed: int, most: int) -> None:
    chance = random.Random(seed)
    rows, inputs = DecodeRows(most), RowInputs(most, 32, CPU)
    sequences = [with_table(*(chance.randrange(99) for _ in range(3))) for _ in range(9)]
    for _ in range(25):
        running = chance.sample(sequences, chance.randrange(1, most + 1))
        for sequence in running:
            if chance.random() < 0.1:
                sequence.block_table = [chance.randrange(99)]
            elif len(sequence.block_table) < 32 and chance.random() < 0.4:
                sequence.block_table.append(chance.randrange(99))
        rows.arrange(running)
        assert sorted(map(id, rows.sequences)) == sorted(map(id, running))
        write(rows, inputs)
        for row, sequence in enumerate(rows.sequences):
            table = sequence.block_table
            assert inputs.tables[row, : len(table)].tolist() == table
