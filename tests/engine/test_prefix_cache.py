"""The prefix cache: evicted from the leaf, reset at once, reported in order."""

from __future__ import annotations

from engine.block_manager import BlockManager
from tests.sequences import BLOCK_SIZE, compute, make_sequence


def make(num_blocks: int = 8, **options: bool) -> BlockManager:
    return BlockManager(num_blocks, BLOCK_SIZE, **options)


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
