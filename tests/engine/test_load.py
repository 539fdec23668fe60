"""What an engine's thread leaves for others to read."""

from __future__ import annotations

from dataclasses import dataclass

from engine.block_manager import BlockManager
from engine.load import REFRESH_SECONDS, LoadSnapshot
from tests.sequences import BLOCK_SIZE, compute, make_sequence


@dataclass
class Counts:
    num_running: int = 0
    num_waiting: int = 0
    queued_tokens: int = 0


def test_the_first_snapshot_is_there_before_the_thread_starts() -> None:
    snapshot = LoadSnapshot(Counts(), BlockManager(8, BLOCK_SIZE))
    assert snapshot.value.num_blocks == snapshot.value.num_free_blocks == 8


def test_what_waits_outside_the_scheduler_counts_too() -> None:
    counts = Counts(num_running=2, num_waiting=1, queued_tokens=10)
    snapshot = LoadSnapshot(counts, BlockManager(8, BLOCK_SIZE), more_waiting=lambda: (3, 50))
    assert snapshot.value.num_running == 2
    assert snapshot.value.num_waiting == 4
    assert snapshot.value.queued_tokens == 60


def test_blocks_are_counted_by_what_they_are_good_for() -> None:
    manager = BlockManager(8, BLOCK_SIZE)
    snapshot = LoadSnapshot(Counts(), manager)
    running, done = make_sequence(range(8)), make_sequence(range(100, 108))
    assert compute(manager, running)
    assert compute(manager, done)
    manager.free(done)
    snapshot.take()
    assert snapshot.value.num_free_blocks == 6
    assert snapshot.value.num_cached_blocks == 2


def test_a_fresh_snapshot_is_kept_and_an_old_one_is_taken_again() -> None:
    now = [100.0]
    counts = Counts()
    snapshot = LoadSnapshot(counts, BlockManager(8, BLOCK_SIZE), clock=lambda: now[0])
    counts.num_running = 1
    snapshot.take_sometimes()
    assert snapshot.value.num_running == 0
    now[0] += 2 * REFRESH_SECONDS
    snapshot.take_sometimes()
    assert snapshot.value.num_running == 1
