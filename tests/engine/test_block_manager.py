"""Blocks: allocated exactly, shared without copies, hit only when computed."""

from __future__ import annotations

import pytest

from cluster.prefix_hash import root_hash
from engine.block_manager import BlockManager
from engine.prefix_cache import BlockAccountingError
from engine.sequence import Sequence
from tests.sequences import BLOCK_SIZE, compute, make_sequence


def make(num_blocks: int = 8, **options: bool) -> BlockManager:
    return BlockManager(num_blocks, BLOCK_SIZE, **options)


# ---- allocation -------------------------------------------------------------------------


def test_a_table_covers_exactly_the_tokens_asked_for() -> None:
    manager, sequence = make(), make_sequence(range(9))
    assert manager.allocate(sequence, 4)
    assert len(sequence.block_table) == 1
    assert manager.allocate(sequence, 5)
    assert len(sequence.block_table) == 2
    assert manager.allocate(sequence, 5)
    assert len(sequence.block_table) == 2
    manager.check_integrity()


def test_a_table_is_only_appended_to_or_replaced() -> None:
    """The model runner keeps copies of tables by the identity of the list."""
    manager, sequence = make(), make_sequence(range(9))
    manager.allocate(sequence, 4)
    table, first = sequence.block_table, list(sequence.block_table)
    manager.allocate(sequence, 9)
    assert sequence.block_table is table
    assert table[:1] == first
    grown = list(table)
    manager.free(sequence)
    manager.allocate(sequence, 9)
    assert sequence.block_table is not table
    assert table == grown


def test_an_allocation_that_does_not_fit_changes_nothing() -> None:
    manager = make(3)
    shared = make_sequence(range(5))
    compute(manager, shared)
    manager.free(shared)
    events, cached = manager.take_events(), manager.num_cached_blocks
    sequence = make_sequence(range(16))
    assert not manager.allocate(sequence, 16)
    assert sequence.block_table == []
    assert sequence.num_computed_tokens == 0
    assert manager.num_cached_blocks == cached
    assert events.stored
    assert not manager.take_events()
    manager.check_integrity()


def test_a_hit_on_unreferenced_blocks_counts_them_against_the_free_ones() -> None:
    manager = make(3)
    first = make_sequence(range(8))
    compute(manager, first)
    manager.free(first)
    assert manager.num_free_blocks == 3
    sequence = make_sequence(range(16))
    assert not manager.allocate(sequence, 16), "2 revived + 2 new > 3"
    assert manager.allocate(sequence, 12)
    assert manager.num_free_blocks == 0
    manager.check_integrity()


def test_headroom_stays_free() -> None:
    manager, sequence = make(4), make_sequence(range(12))
    assert not manager.allocate(sequence, 12, headroom=2)
    assert manager.allocate(sequence, 12, headroom=1)
    assert not manager.allocate(sequence, 16, headroom=1)


def test_free_is_idempotent() -> None:
    manager, sequence = make(), make_sequence(range(9))
    manager.allocate(sequence, 9)
    manager.free(sequence)
    manager.free(sequence)
    assert manager.num_free_blocks == 8
    manager.check_integrity()


def test_a_sequence_that_says_it_has_computed_without_blocks_is_a_bug() -> None:
    manager, sequence = make(), make_sequence(range(9))
    sequence.num_computed_tokens = 4
    with pytest.raises(BlockAccountingError):
        manager.allocate(sequence, 9)


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 4), (4, 0)])
def test_an_empty_pool_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        BlockManager(num_blocks, block_size)


# ---- sharing ----------------------------------------------------------------------------


def test_sequences_that_begin_alike_share_blocks_without_copies() -> None:
    manager = make()
    first, second = make_sequence(range(12)), make_sequence([*range(8), 99])
    compute(manager, first)
    assert manager.allocate(second, 9)
    assert second.block_table[:2] == first.block_table[:2]
    assert second.num_computed_tokens == second.num_cached_tokens == 8
    assert manager.num_referenced_blocks == 4
    manager.free(first)
    assert manager.num_referenced_blocks == 3
    manager.check_integrity()


def test_a_block_is_hit_only_once_it_is_computed() -> None:
    manager = make()
    first, second = make_sequence(range(12)), make_sequence(range(12))
    manager.allocate(first, 12)
    first.num_computed_tokens = 7
    manager.mark_computed(first)
    assert manager.allocate(second, 12)
    assert second.num_cached_tokens == 4, "the second block has one token to go"


def test_a_fully_cached_prompt_leaves_a_token_to_compute() -> None:
    manager = make()
    first, second = make_sequence(range(8)), make_sequence(range(8))
    compute(manager, first)
    assert manager.allocate(second, 8)
    assert second.num_computed_tokens == 4
    assert second.num_uncomputed_tokens >= 1
    assert second.block_table[1] != first.block_table[1]


def test_a_prompt_of_one_full_block_is_never_hit_whole() -> None:
    manager = make()
    first, second = make_sequence(range(4)), make_sequence(range(4))
    compute(manager, first)
    assert manager.allocate(second, 4)
    assert second.num_computed_tokens == 0


def test_two_that_compute_the_same_block_keep_their_own_and_one_is_registered() -> None:
    manager = make()
    first, second = make_sequence(range(5)), make_sequence(range(5))
    manager.allocate(first, 5)
    manager.allocate(second, 5)
    for sequence in (first, second):
        sequence.num_computed_tokens = 5
        manager.mark_computed(sequence)
    assert first.block_table[0] != second.block_table[0]
    assert manager.match_prefix(first.block_hashes) == first.block_table[:1]
    manager.free(second)
    assert manager.num_cached_blocks == 0, "the second copy is free at once"
    manager.free(first)
    assert manager.num_cached_blocks == 1
    manager.check_integrity()


def test_the_freed_copy_of_a_registered_block_does_not_take_the_name_with_it() -> None:
    """nano-vllm #163: a stale hash map entry pointed at a block that had been reused."""
    manager = make(4)
    first, second = make_sequence(range(5)), make_sequence(range(5))
    manager.allocate(first, 5)
    manager.allocate(second, 5)
    for sequence in (first, second):
        sequence.num_computed_tokens = 5
        manager.mark_computed(sequence)
    manager.free(first)  # the registered copy is cached now
    other = make_sequence(range(100, 108))
    assert compute(manager, other), "takes the free block and evicts the cached one"
    assert manager.match_prefix(second.block_hashes) == []
    third = make_sequence(range(5))
    manager.free(second)
    assert manager.allocate(third, 5)
    assert third.num_cached_tokens == 0
    assert not set(third.block_table) & set(other.block_table)
    manager.check_integrity()


def test_a_prompt_of_exactly_the_pool_is_served_twice() -> None:
    """nano-vllm #144, #199: a fully cached prompt crashed."""
    manager = make(2)
    for expected_hit in (0, 4):
        sequence = make_sequence(range(8))
        assert compute(manager, sequence)
        assert sequence.num_cached_tokens == expected_hit
        manager.free(sequence)
        manager.check_integrity()


def test_a_neighbour_in_the_same_step_does_not_hit_what_is_only_allocated() -> None:
    """nano-vllm #209: blocks were hit before any kernel had written them."""
    manager = make()
    first, second = make_sequence(range(8)), make_sequence(range(8))
    assert manager.allocate(first, 8)
    assert manager.allocate(second, 8)
    assert second.num_cached_tokens == 0
    assert not set(first.block_table) & set(second.block_table)


def test_a_preempted_sequence_resumes_on_its_own_cached_blocks() -> None:
    """nano-vllm #211, #233: index error on preemption with a prefix hit."""
    manager = make()
    sequence = make_sequence(range(6), output=range(50, 55))
    compute(manager, sequence)
    manager.free(sequence)
    sequence.num_preemptions = 1
    sequence.append_token(55)
    assert manager.allocate(sequence, 12)
    assert sequence.num_computed_tokens == 8, "blocks with output tokens are hit too"
    assert sequence.num_cached_tokens == 0, "what the client is told does not change"
    sequence.num_computed_tokens = 12
    manager.mark_computed(sequence)
    assert len(manager.match_prefix(sequence.block_hashes)) == 3
    manager.check_integrity()


def test_output_tokens_are_hit_by_the_next_turn_of_a_conversation() -> None:
    manager = make()
    first = make_sequence(range(5), output=[7, 8, 9])
    compute(manager, first)
    manager.free(first)
    second = make_sequence([*range(5), 7, 8, 9, 10])
    manager.allocate(second, 9)
    assert second.num_cached_tokens == 8


def test_another_tenant_never_hits() -> None:
    manager = make()
    first = make_sequence(range(9))
    compute(manager, first)
    other = Sequence(first.request, block_size=BLOCK_SIZE, root=root_hash("model", b"tenant"))
    manager.allocate(other, 9)
    assert other.num_cached_tokens == 0


def test_without_prefix_caching_nothing_is_registered() -> None:
    manager = make(enable_prefix_caching=False)
    first, second = make_sequence(range(9)), make_sequence(range(9))
    compute(manager, first)
    manager.free(first)
    assert manager.num_cached_blocks == 0
    assert not manager.take_events()
    assert manager.allocate(second, 9)
    assert second.num_cached_tokens == 0


# ---- integrity --------------------------------------------------------------------------


def test_a_lost_reference_is_noticed() -> None:
    manager = make()
    sequence = make_sequence(range(9))
    manager.allocate(sequence, 9)
    sequence.block_table.pop()
    with pytest.raises(BlockAccountingError, match="references"):
        manager.check_integrity()


def test_a_table_too_short_for_its_tokens_is_noticed() -> None:
    manager = make()
    sequence = make_sequence(range(9))
    manager.allocate(sequence, 4)
    sequence.num_computed_tokens = 5
    with pytest.raises(BlockAccountingError, match="beyond"):
        manager.check_integrity()
