"""Holds and reservations: blocks in transfer belong to the transfer."""

from __future__ import annotations

import pytest

from engine.block_manager import BlockManager
from engine.prefix_cache import BlockAccountingError
from tests.sequences import BLOCK_SIZE, compute, make_sequence


def make(num_blocks: int = 8, **options: bool) -> BlockManager:
    return BlockManager(num_blocks, BLOCK_SIZE, **options)


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
