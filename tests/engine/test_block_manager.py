"""Blocks: shared without copies, hit only when computed, given back exactly once."""

from __future__ import annotations

import pytest

from cluster.prefix_hash import root_hash
from engine.block_manager import BlockAccountingError, BlockManager
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


# ---- eviction ---------------------------------------------------------------------------


def test_the_least_recently_used_is_evicted_from_its_leaf() -> None:
    manager = make(5)
    old, new = make_sequence(range(8)), make_sequence(range(100, 108))
    for sequence in (old, new):
        compute(manager, sequence)
        manager.free(sequence)
    compute(manager, make_sequence([200] * 8))
    assert len(manager.match_prefix(old.block_hashes)) == 1, "its leaf went, its root stayed"
    assert len(manager.match_prefix(new.block_hashes)) == 2
    manager.check_integrity()


def test_an_idle_prefix_goes_whole_before_a_newer_one_loses_its_leaf() -> None:
    manager = make(7)
    old, new = make_sequence(range(12)), make_sequence(range(100, 112))
    for sequence in (old, new):
        compute(manager, sequence)
        manager.free(sequence)
    compute(manager, make_sequence([200] * 16))
    assert manager.match_prefix(old.block_hashes) == []
    assert len(manager.match_prefix(new.block_hashes)) == 3


def test_a_hit_makes_a_prefix_recent() -> None:
    manager = make(5)
    old, new = make_sequence(range(8)), make_sequence(range(100, 108))
    for sequence in (old, new):
        compute(manager, sequence)
        manager.free(sequence)
    again = make_sequence([*range(8), 1])
    manager.allocate(again, 8)
    manager.free(again)
    compute(manager, make_sequence([200] * 8))
    assert len(manager.match_prefix(old.block_hashes)) == 2
    assert len(manager.match_prefix(new.block_hashes)) == 1


def test_a_prefix_used_again_without_its_leaf_outlives_an_idle_one() -> None:
    manager = make(6)
    old = make_sequence(range(8))
    idle = make_sequence(range(100, 105))
    for sequence in (old, idle):
        compute(manager, sequence)
        manager.free(sequence)
    prefix_only = make_sequence(range(5))
    manager.allocate(prefix_only, 5)
    manager.free(prefix_only)
    taker = make_sequence([200] * 20)
    compute(manager, taker)  # 3 free blocks, then the old leaf, then ...
    assert len(manager.match_prefix(idle.block_hashes)) == 0
    assert len(manager.match_prefix(old.block_hashes)) == 1


def test_referenced_blocks_are_never_evicted() -> None:
    manager = make(4)
    first = make_sequence(range(8))
    compute(manager, first)
    table = list(first.block_table)
    assert compute(manager, make_sequence(range(100, 108)))
    assert not manager.allocate(make_sequence(range(200, 204)), 4)
    assert first.block_table == table
    assert manager.match_prefix(first.block_hashes) == table


def test_blocks_below_an_evicted_parent_lose_their_names_but_not_their_owner() -> None:
    manager = make(4)
    first, second = make_sequence(range(9)), make_sequence([*range(8), 77])
    manager.allocate(first, 4)
    manager.allocate(second, 4)
    for sequence in (first, second):  # both compute block 0; the first one's is registered
        sequence.num_computed_tokens = 4
        manager.mark_computed(sequence)
    assert compute(manager, second, 8), "registered below the first one's block"
    manager.free(first)
    manager.take_events()
    assert compute(manager, make_sequence(range(100, 108))), "needs the parent's block"
    assert manager.match_prefix(second.block_hashes) == []
    assert manager.take_events().removed[:2] == tuple(second.block_hashes[1::-1])
    manager.check_integrity()


def test_a_cached_block_that_gets_a_child_is_no_leaf_any_more() -> None:
    manager = make(5)
    first, second = make_sequence(range(5)), make_sequence(range(9))
    manager.allocate(first, 4)
    manager.allocate(second, 8)
    for sequence in (first, second):
        sequence.num_computed_tokens = 4
        manager.mark_computed(sequence)
    manager.free(first)  # its block 0 is cached; the second one has its own
    compute(manager, second, 8)
    manager.check_integrity()
    manager.free(second)
    compute(manager, make_sequence(range(100, 116)))
    assert len(manager.match_prefix(second.block_hashes)) == 1, "the child went first"
    manager.check_integrity()


def test_a_sequence_registers_its_own_copies_after_the_shared_ones_are_gone() -> None:
    manager = make(5)
    first, second = make_sequence(range(9)), make_sequence(range(13))
    manager.allocate(first, 4)
    manager.allocate(second, 4)
    for sequence in (first, second):
        sequence.num_computed_tokens = 4
        manager.mark_computed(sequence)
    compute(manager, second, 8)
    manager.free(first)
    filler = make_sequence(range(100, 112))
    assert compute(manager, filler)
    manager.free(filler)
    assert compute(manager, second, 12)
    assert manager.match_prefix(second.block_hashes) == second.block_table[:3]
    manager.check_integrity()


# ---- holds ------------------------------------------------------------------------------


def test_held_blocks_outlive_their_sequence() -> None:
    manager = make(2)
    sequence = make_sequence(range(7))
    compute(manager, sequence)
    hold = manager.hold(sequence.block_table, "transfer")
    manager.free(sequence)
    assert manager.num_held_blocks == 2
    assert not manager.allocate(make_sequence(range(100, 104)), 4)
    hold.release()
    assert hold.is_released
    assert manager.num_free_blocks == 2
    manager.check_integrity()


def test_releasing_twice_drops_one_reference() -> None:
    manager = make()
    sequence = make_sequence(range(8))
    compute(manager, sequence)
    hold, other = (manager.hold(sequence.block_table, name) for name in ("a", "b"))
    hold.release()
    hold.release()
    manager.free(sequence)
    assert manager.num_referenced_blocks == 2
    other.release()
    assert manager.num_referenced_blocks == 0
    manager.check_integrity()


def test_a_free_block_cannot_be_held() -> None:
    manager = make()
    sequence = make_sequence(range(3))
    compute(manager, sequence)
    table = list(sequence.block_table)
    manager.free(sequence)
    with pytest.raises(BlockAccountingError, match="late"):
        manager.hold(table, "transfer")
    manager.check_integrity()


def test_a_cached_block_can_be_held() -> None:
    manager = make(2)
    sequence = make_sequence(range(8))
    compute(manager, sequence)
    table = list(sequence.block_table)
    manager.free(sequence)
    hold = manager.hold(table, "transfer")
    assert manager.num_free_blocks == 0
    assert manager.match_prefix(sequence.block_hashes) == table
    hold.release()
    manager.check_integrity()


def test_leaked_blocks_have_a_name() -> None:
    manager = make()
    sequence = make_sequence(range(8))
    compute(manager, sequence)
    manager.hold(sequence.block_table, "transfer of x to d1")
    manager.free(sequence)
    assert any("transfer of x to d1" in owner for owner in manager.owners())


# ---- reservations -----------------------------------------------------------------------


def test_a_reservation_says_which_leading_blocks_need_no_transfer() -> None:
    manager = make()
    first = make_sequence(range(9))
    compute(manager, first)
    arriving = make_sequence(range(12))
    reservation = manager.reserve(arriving.block_hashes, 12)
    assert reservation is not None
    assert reservation.num_held_blocks == 2
    assert list(reservation.block_ids[:2]) == first.block_table[:2]
    assert len(reservation.block_ids) == 3
    reservation.cancel()
    manager.check_integrity()


def test_reserved_blocks_are_hit_by_nobody_before_they_are_attached() -> None:
    manager = make()
    arriving, other = make_sequence(range(8), output=[5]), make_sequence(range(9))
    reservation = manager.reserve(arriving.block_hashes, 8)
    assert reservation is not None
    assert manager.match_prefix(other.block_hashes) == []
    reservation.attach(arriving)
    assert manager.match_prefix(other.block_hashes) == list(reservation.block_ids)


def test_an_attached_sequence_is_one_token_from_decoding() -> None:
    manager = make()
    arriving = make_sequence(range(8), output=[5])
    reservation = manager.reserve(arriving.block_hashes, 8)
    assert reservation is not None
    reservation.attach(arriving)
    assert arriving.num_uncomputed_tokens == 1
    assert arriving.block_table == list(reservation.block_ids)
    reservation.cancel()
    assert manager.num_referenced_blocks == 2, "cancel after attach does nothing"
    manager.free(arriving)
    assert manager.num_free_blocks == 8
    manager.check_integrity()


def test_only_what_was_verified_is_registered_on_attach() -> None:
    manager = make()
    arriving = make_sequence(range(12), output=[5])
    reservation = manager.reserve(arriving.block_hashes, 12)
    assert reservation is not None
    reservation.attach(arriving, num_computed_tokens=4)
    assert len(manager.match_prefix(arriving.block_hashes)) == 1
    assert arriving.num_uncomputed_tokens == 9
    manager.check_integrity()


@pytest.mark.parametrize("end", ["attach", "cancel"])
def test_a_reservation_is_attached_at_most_once(end: str) -> None:
    manager = make()
    arriving, other = make_sequence(range(8), output=[5]), make_sequence(range(8), output=[6])
    reservation = manager.reserve(arriving.block_hashes, 8)
    assert reservation is not None
    if end == "attach":
        reservation.attach(arriving)
    else:
        reservation.cancel()
        reservation.cancel()
    with pytest.raises(BlockAccountingError):
        reservation.attach(other)
    assert other.block_table == []
    manager.check_integrity()


def test_a_reservation_is_not_attached_where_it_would_leak() -> None:
    manager = make()
    arriving = make_sequence(range(8), output=[5])
    reservation = manager.reserve(arriving.block_hashes, 8)
    assert reservation is not None
    manager.allocate(arriving, 9)
    with pytest.raises(BlockAccountingError, match="blocks already"):
        reservation.attach(arriving)
    complete = make_sequence(range(8))
    with pytest.raises(BlockAccountingError, match="do not fit"):
        reservation.attach(complete)
    reservation.cancel()
    manager.free(arriving)
    assert manager.num_free_blocks == 8
    manager.check_integrity()


def test_a_reservation_that_does_not_fit_is_none_and_takes_nothing() -> None:
    manager = make(2)
    assert manager.reserve(make_sequence(range(12)).block_hashes, 12) is None
    assert manager.num_free_blocks == 2


def test_an_arriving_duplicate_of_a_running_sequence_stays_private() -> None:
    manager = make()
    arriving, local = make_sequence(range(8), output=[5]), make_sequence(range(8))
    reservation = manager.reserve(arriving.block_hashes, 8)
    assert reservation is not None
    compute(manager, local)
    reservation.attach(arriving)
    assert manager.match_prefix(arriving.block_hashes) == local.block_table
    manager.free(local)
    manager.free(arriving)
    assert manager.num_free_blocks == 8
    assert manager.num_cached_blocks == 2
    manager.check_integrity()


# ---- reset and forget -------------------------------------------------------------------


def test_a_reset_forgets_cached_blocks_and_those_in_use_for_good() -> None:
    manager = make()
    idle, running = make_sequence(range(8)), make_sequence(range(100, 112))
    compute(manager, idle)
    manager.free(idle)
    compute(manager, running, 8)
    assert manager.reset_prefix_cache() == 4
    assert manager.num_cached_blocks == 0
    compute(manager, running, 12)
    assert manager.match_prefix(running.block_hashes) == []
    manager.free(running)
    assert manager.num_cached_blocks == 0
    manager.check_integrity()
    assert compute(manager, running), "after it lost its old blocks it is like any other"
    assert len(manager.match_prefix(running.block_hashes)) == 3


def test_a_reset_reaches_what_was_reserved_before_it() -> None:
    manager = make()
    arriving = make_sequence(range(8), output=[5])
    reservation = manager.reserve(arriving.block_hashes, 8)
    assert reservation is not None
    manager.reset_prefix_cache()
    reservation.attach(arriving)
    assert manager.match_prefix(arriving.block_hashes) == []


def test_forgotten_blocks_are_hit_by_nobody_not_even_through_a_sharer() -> None:
    manager = make(12)
    broken, sharer = make_sequence(range(8)), make_sequence([*range(8), 9, 9, 9, 9, 9])
    stranger = make_sequence(range(100, 108))
    compute(manager, broken)
    compute(manager, sharer, 9)
    compute(manager, stranger)
    manager.forget(broken)
    compute(manager, sharer, 13)
    assert manager.match_prefix(sharer.block_hashes) == []
    assert len(manager.match_prefix(stranger.block_hashes)) == 2
    for sequence in (broken, sharer, stranger):
        manager.free(sequence)
    assert manager.num_cached_blocks == 2
    manager.check_integrity()


def test_a_reservation_on_forgotten_blocks_is_not_registered_again() -> None:
    manager = make()
    broken, arriving = make_sequence(range(8)), make_sequence(range(12), output=[1])
    compute(manager, broken)
    reservation = manager.reserve(arriving.block_hashes, 12)
    assert reservation is not None
    assert reservation.num_held_blocks == 2
    manager.forget(broken)
    reservation.attach(arriving)
    assert manager.match_prefix(arriving.block_hashes) == []


def test_a_sequence_that_lost_its_blocks_can_get_others_from_a_transfer() -> None:
    manager = make()
    sequence = make_sequence(range(8), output=[1])
    compute(manager, sequence)
    manager.free(sequence)
    manager.reset_prefix_cache()
    reservation = manager.reserve(sequence.block_hashes, 8)
    assert reservation is not None
    reservation.attach(sequence)
    assert len(manager.match_prefix(sequence.block_hashes)) == 2


# ---- events -----------------------------------------------------------------------------


def test_events_are_stored_parent_first_and_removed_leaf_first() -> None:
    manager = make(3)
    sequence = make_sequence(range(12))
    compute(manager, sequence)
    assert manager.take_events().stored == tuple(sequence.block_hashes)
    assert not manager.take_events(), "each is told once"
    manager.free(sequence)
    compute(manager, make_sequence(range(100, 112)))
    assert manager.take_events().removed == tuple(reversed(sequence.block_hashes))


def test_opposite_changes_between_two_reports_are_none() -> None:
    manager = make(2)
    first, second = make_sequence(range(8)), make_sequence(range(100, 107))
    compute(manager, first)
    manager.take_events()
    manager.free(first)
    compute(manager, second)
    manager.free(second)
    compute(manager, first)
    manager.free(first)
    events = manager.take_events()
    assert events.stored == ()
    assert events.removed == ()


def test_a_reset_is_reported_leaf_first() -> None:
    manager = make()
    sequence = make_sequence(range(12))
    compute(manager, sequence)
    manager.take_events()
    manager.reset_prefix_cache()
    assert manager.take_events().removed == tuple(reversed(sequence.block_hashes))


def test_all_that_can_be_hit_is_listed_parents_first() -> None:
    manager = make()
    sequence = make_sequence(range(12))
    compute(manager, sequence)
    assert manager.cached_hashes() == sequence.block_hashes


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
