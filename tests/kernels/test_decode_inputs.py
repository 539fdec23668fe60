"""Inputs of decode rows: known tokens, tokens that are on the device, and padding."""

from __future__ import annotations

import torch

from kernels.decode_inputs import DecodeInputs, fill_decode_inputs, write_entries


def poisoned(num_rows: int, device: torch.device) -> DecodeInputs:
    inputs = DecodeInputs.empty(num_rows, device)
    for each in inputs:
        each.fill_(-99)
    return inputs


def test_a_row_is_its_last_token_at_its_place(device: torch.device) -> None:
    tables = torch.tensor([[7, 3, 9], [1, 0, 5], [2, 2, 2]], dtype=torch.int32, device=device)
    out = poisoned(3, device)
    fill_decode_inputs(
        torch.tensor([6, 9, 0], device=device),
        torch.tensor([105, 108, 55], dtype=torch.int32, device=device),
        torch.tensor([-1, -1, -1], dtype=torch.int32, device=device),
        torch.tensor([11, 12], device=device),
        tables,
        4,
        out,
    )
    assert out.token_ids.tolist() == [105, 108, 0]
    assert out.positions.tolist() == [5, 8, 0]
    assert out.slot_mapping.tolist() == [13, 20, -1]
    assert out.seq_lens.tolist() == [6, 9, 0]


def test_tokens_come_from_where_the_last_step_left_them(device: torch.device) -> None:
    """A draw that failed left -1, which is no row of the embedding."""
    tables = torch.arange(8, dtype=torch.int32, device=device).view(4, 2)
    out = poisoned(4, device)
    fill_decode_inputs(
        torch.tensor([1, 2, 3, 4], device=device),
        torch.tensor([5, 5, 5, 5], dtype=torch.int32, device=device),
        torch.tensor([2, -1, 0, 1], dtype=torch.int32, device=device),
        torch.tensor([40, -1, 42, 43], device=device),
        tables,
        2,
        out,
    )
    assert out.token_ids.tolist() == [42, 5, 40, 0]
    assert out.slot_mapping.tolist() == [0, 5, 10, 15]


def test_many_rows(device: torch.device) -> None:
    num_rows, block_size, width = 300, 16, 40
    ends = torch.randint(0, block_size * width, (num_rows,))
    tables = torch.randint(0, 1000, (num_rows + 5, width), dtype=torch.int32)
    sources = torch.randint(-1, 20, (num_rows,), dtype=torch.int32)
    tokens = torch.randint(0, 99, (num_rows,), dtype=torch.int32)
    drawn = torch.randint(0, 99, (20,))
    out = poisoned(num_rows, device)
    fill_decode_inputs(
        ends.to(device),
        tokens.to(device),
        sources.to(device),
        drawn.to(device),
        tables.to(device),
        block_size,
        out,
    )
    for row in range(num_rows):
        end, source = int(ends[row]), int(sources[row])
        if end == 0:
            assert [int(each[row]) for each in out] == [0, 0, -1, 0]
            continue
        block = int(tables[row, (end - 1) // block_size])
        token = int(drawn[source] if source >= 0 else tokens[row])
        slot = block * block_size + (end - 1) % block_size
        assert [int(each[row]) for each in out] == [token, end - 1, slot, end]


def test_entries_are_written_and_nothing_else(device: torch.device) -> None:
    tables = torch.full((5, 300), -1, dtype=torch.int32, device=device)
    places = torch.randperm(1500)[:777].int()
    values = torch.randint(0, 99, (777,), dtype=torch.int32)
    expected = tables.cpu().view(-1).clone()
    expected[places.long()] = values
    write_entries(tables, places.to(device), values.to(device))
    assert torch.equal(tables.cpu().view(-1), expected)
    write_entries(tables, places[:0].to(device), values[:0].to(device))
    assert torch.equal(tables.cpu().view(-1), expected)
