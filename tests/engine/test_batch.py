"""The input tensors of a step say exactly what the sequences and their block tables say."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

import pytest
import torch

from cluster.prefix_hash import root_hash
from cluster.request import SamplingParams, SequenceRequest
from engine.batch import BatchBuilder
from engine.schedule import ScheduledChunk
from engine.sequence import Sequence

if TYPE_CHECKING:
    from collections.abc import Iterable

BLOCK_SIZE = 4


@pytest.fixture
def builder() -> BatchBuilder:
    return BatchBuilder(
        block_size=BLOCK_SIZE,
        max_num_seqs=4,
        max_num_batched_tokens=32,
        max_model_len=32,
        device=torch.device("cpu"),
    )


def sequence(
    name: str, num_tokens: int, *, computed: int = 0, table: Iterable[int] = ()
) -> Sequence:
    made = Sequence(
        SequenceRequest(
            sequence_id=name,
            request_id=name,
            prompt_token_ids=tuple(range(100, 100 + num_tokens)),
            sampling=SamplingParams(max_tokens=8, seed=0),
        ),
        block_size=BLOCK_SIZE,
        root=root_hash("test", b""),
    )
    made.num_computed_tokens = computed
    made.block_table = list(table)
    return made


def test_a_prefill_batch_lays_chunks_one_after_the_other(builder: BatchBuilder) -> None:
    first = sequence("a", 6, table=[7, 3])
    second = sequence("b", 9, computed=4, table=[1, 0, 5])
    batch = builder.build_prefill([ScheduledChunk(first, 6), ScheduledChunk(second, 3)])
    assert batch.token_ids.tolist() == [100, 101, 102, 103, 104, 105, 104, 105, 106]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5, 4, 5, 6]
    assert batch.slot_mapping.tolist() == [28, 29, 30, 31, 12, 13, 0, 1, 2]
    assert batch.cu_seqlens_q.tolist() == [0, 6, 9]
    assert batch.seq_lens.tolist() == [6, 7]
    assert batch.block_tables[:, :2].tolist() == [[7, 3], [1, 0]]
    assert batch.max_seqlen_q == 6
    assert batch.samples is not None
    assert batch.samples.indices.tolist() == [5]  # the second stops short of its last token
    assert batch.samples.rows.tolist() == [0]
    assert batch.num_samples == 1
    assert not batch.is_decode


def test_tables_are_of_few_widths(builder: BatchBuilder) -> None:
    """A kernel is compiled anew for strides that are no multiple of 16."""
    for num_tokens in (1, 5, 32):
        table = list(range(-(-num_tokens // BLOCK_SIZE)))
        one = sequence(f"s{num_tokens}", num_tokens, table=table)
        batch = builder.build_prefill([ScheduledChunk(one, num_tokens)])
        assert batch.block_tables.shape == (1, 16)


def test_a_table_that_grew_is_seen(builder: BatchBuilder) -> None:
    growing = sequence("a", 9, table=[7])
    builder.build_prefill([ScheduledChunk(growing, 4)])
    growing.num_computed_tokens = 4
    growing.block_table += [2, 6]
    batch = builder.build_prefill([ScheduledChunk(growing, 5)])
    assert batch.block_tables[:, :3].tolist() == [[7, 2, 6]]
    assert batch.slot_mapping.tolist() == [8, 9, 10, 11, 24]


def test_a_chunk_begins_where_the_one_in_flight_ends(builder: BatchBuilder) -> None:
    prompt = sequence("a", 9, table=[7, 2, 6])
    prompt.num_launched_tokens = 5
    batch = builder.build_prefill([ScheduledChunk(prompt, 4)])
    assert batch.positions.tolist() == [5, 6, 7, 8]
    assert batch.token_ids.tolist() == [105, 106, 107, 108]
    assert batch.seq_lens.tolist() == [9]
    assert batch.num_samples == 1


def test_more_sequences_than_rows_take_turns(builder: BatchBuilder) -> None:
    """Rows are twice `max_num_seqs`; twelve sequences of which four run at a time need more."""
    sequences = [sequence(f"s{i}", 2, table=[10 + i]) for i in range(12)]
    for _ in range(2):
        for first in range(0, 12, 4):
            running = sequences[first : first + 4]
            batch = builder.build_prefill([ScheduledChunk(each, 2) for each in running])
            assert batch.block_tables[:, 0].tolist() == [each.block_table[0] for each in running]


@pytest.mark.parametrize("lengths", [(1,), (3, 5), (7, 1, 2)])
def test_each_array_begins_where_kernels_take_it_without_another_compilation(
    builder: BatchBuilder, lengths: tuple[int, ...]
) -> None:
    chunks = [
        ScheduledChunk(sequence(f"s{index}", length, table=[index * 2, index * 2 + 1]), length)
        for index, length in enumerate(lengths)
    ]
    batch = builder.build_prefill(chunks)
    assert batch.samples is not None
    arrays = [*batch.samples, *(getattr(batch, field.name) for field in fields(batch))]
    places = [array.data_ptr() for array in arrays if isinstance(array, torch.Tensor)]
    assert len(places) == 8
    assert all(place % 16 == 0 for place in places)
