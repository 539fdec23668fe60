"""Blocks over two tiers: when they are saved, what a load brings, and who owns what meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from engine.block_copies import CopyKind
from engine.block_manager import BlockManager
from tests.sequences import BLOCK_SIZE, compute, make_sequence

if TYPE_CHECKING:
    from engine.block_copies import BlockCopy
    from engine.host_blocks import HostBlocks
    from engine.sequence import Sequence

PROMPT = range(3 * BLOCK_SIZE + 1)
OTHER = range(1000, 1000 + 4 * BLOCK_SIZE)


class Tiers:
    """A pool and its host memory; copies end when the test says so. A digest is 7."""

    def __init__(self, num_blocks: int = 4, num_host_blocks: int = 16) -> None:
        self.manager = BlockManager(
            num_blocks,
            BLOCK_SIZE,
            num_host_blocks=num_host_blocks,
            num_ahead=num_blocks if num_blocks < 32 else 0,
        )

    @property
    def host(self) -> HostBlocks:
        assert self.manager.host is not None
        return self.manager.host

    def end(self, copy: BlockCopy, *, digest: int = 7) -> None:
        self.host.end(copy, [digest] * len(copy.entries))
        self.manager.check_integrity()

    def settle(self) -> None:
        while copies := self.host.take_copies():
            for copy in copies:
                self.end(copy)

    def run(self, prompt: range) -> Sequence:
        """Compute a prompt and let go of it; what it leaves is saved."""
        sequence = make_sequence(prompt)
        assert compute(self.manager, sequence)
        self.manager.free(sequence)
        self.settle()
        return sequence

    def evicted(self, prompt: range = PROMPT) -> None:
        """Leave a prompt in host memory alone."""
        self.run(prompt)
        hold = make_sequence(OTHER)
        assert self.manager.allocate(hold, self.manager.num_blocks * BLOCK_SIZE)
        self.manager.free(hold)

    def loading(self, prompt: range = PROMPT) -> tuple[Sequence, BlockCopy]:
        sequence = make_sequence(prompt)
        assert self.manager.allocate(sequence, sequence.num_tokens)
        (copy,) = self.host.take_copies()
        assert copy.kind is CopyKind.LOAD
        return sequence, copy


def test_a_prompt_whose_beginning_was_evicted_is_loaded_and_not_computed() -> None:
    tiers = Tiers()
    tiers.evicted()
    sequence, copy = tiers.loading()
    assert sequence.is_loading
    assert sequence.num_computed_tokens == 0
    assert copy.block_ids == tuple(sequence.block_table[:3])
    tiers.end(copy)
    assert not sequence.is_loading
    assert sequence.num_computed_tokens == sequence.num_cached_tokens == 3 * BLOCK_SIZE
    assert tiers.manager.match_prefix(sequence.block_hashes) == sequence.block_table[:3]
    assert tiers.host.stats.num_hit_tokens == 3 * BLOCK_SIZE


def test_from_the_first_block_that_has_changed_on_all_is_computed() -> None:
    tiers = Tiers()
    tiers.evicted()
    sequence, copy = tiers.loading()
    tiers.host.end(copy, [7, 8, 7])
    assert sequence.num_computed_tokens == BLOCK_SIZE
    assert tiers.host.stats.num_bad_blocks == 1
    assert len(tiers.host.tier.match(sequence.block_hashes)) == 1, "the rest is forgotten"
    tiers.manager.check_integrity()


@pytest.mark.parametrize("kind", ["save", "load"])
def test_blocks_belong_to_the_copy_until_it_ends(kind: str) -> None:
    tiers = Tiers()
    if kind == "load":
        tiers.evicted()
        sequence, copy = tiers.loading()
        tiers.manager.free(sequence)
    else:
        sequence = make_sequence(PROMPT)
        compute(tiers.manager, sequence)
        tiers.manager.free(sequence)
        (copy,) = tiers.host.take_copies()
    num_owned = len(copy.block_ids)
    assert tiers.manager.num_free_blocks == 4 - num_owned
    assert tiers.manager.num_coming_blocks == num_owned
    tiers.end(copy)
    assert tiers.manager.num_free_blocks == 4
    assert not sequence.is_loading
    assert sequence.num_computed_tokens == 0


def test_a_slot_that_is_read_is_not_given_to_another_block() -> None:
    tiers = Tiers(num_blocks=8, num_host_blocks=3)
    tiers.evicted()
    sequence, copy = tiers.loading()
    other = make_sequence(OTHER)
    compute(tiers.manager, other)
    tiers.manager.free(other)
    saves = tiers.host.take_copies()
    assert saves == [], "every slot is read"
    tiers.end(copy)
    assert sequence.num_computed_tokens == 3 * BLOCK_SIZE


def test_a_block_that_somebody_loads_is_waited_for_and_not_loaded_twice() -> None:
    tiers = Tiers(num_blocks=8)
    tiers.evicted()
    _, copy = tiers.loading()
    second = make_sequence(PROMPT)
    assert not tiers.manager.allocate(second, second.num_tokens)
    tiers.end(copy)
    assert tiers.manager.allocate(second, second.num_tokens)
    assert not second.is_loading
    assert second.num_computed_tokens == 3 * BLOCK_SIZE


def test_what_cannot_be_trusted_is_forgotten_on_both_tiers_with_all_that_extends_it() -> None:
    tiers = Tiers(num_blocks=8)
    longer = range(5 * BLOCK_SIZE)
    tiers.run(longer)
    sequence = make_sequence(range(2 * BLOCK_SIZE))
    compute(tiers.manager, sequence)
    tiers.manager.forget(sequence)
    tiers.manager.free(sequence)
    assert tiers.host.tier.num_ready == 0
    assert tiers.manager.cached_hashes() == []


def test_a_save_that_a_forgotten_block_precedes_is_not_believed_when_it_ends() -> None:
    """Its parent is computed anew meanwhile, so nothing else would tell that it is a bad one's."""
    tiers = Tiers(num_blocks=8)
    longer = make_sequence(range(5 * BLOCK_SIZE))
    compute(tiers.manager, longer)
    tiers.manager.free(longer)
    (copy,) = tiers.host.take_copies()
    (leaf,) = copy.entries
    broken = make_sequence(range(2 * BLOCK_SIZE))
    compute(tiers.manager, broken)
    tiers.manager.forget(broken)
    tiers.manager.free(broken)
    again = make_sequence(range(4 * BLOCK_SIZE + 1))
    compute(tiers.manager, again)
    assert leaf.parent in tiers.manager.cached_hashes()
    tiers.end(copy)
    assert leaf.block_hash not in tiers.host.tier
    assert leaf.block_hash not in tiers.manager.cached_hashes()


def test_a_load_of_what_is_forgotten_meanwhile_is_not_believed() -> None:
    tiers = Tiers(num_blocks=8)
    tiers.evicted()
    sequence, copy = tiers.loading()
    tiers.host.tier.forget(sequence.block_hashes[:1])
    tiers.end(copy)
    assert sequence.num_computed_tokens == 0


def test_a_preempted_sequence_resumes_at_its_last_token() -> None:
    tiers = Tiers(num_blocks=8)
    sequence = make_sequence(PROMPT, output=[1, 2])
    compute(tiers.manager, sequence, sequence.num_tokens - 1)
    tiers.manager.preempt(sequence)
    sequence.num_preemptions += 1
    tiers.settle()
    assert tiers.manager.num_free_blocks == 8
    fill = make_sequence(range(5000, 5000 + 8 * BLOCK_SIZE))
    assert tiers.manager.allocate(fill, fill.num_tokens)
    tiers.manager.free(fill)
    assert tiers.manager.allocate(sequence, sequence.num_tokens)
    (copy,) = tiers.host.take_copies()
    tiers.end(copy)
    assert sequence.num_uncomputed_tokens == 1
    assert tiers.host.tier.num_ready == 3, "its last block was for it alone"


def test_what_a_full_tier_cannot_take_is_computed_again() -> None:
    tiers = Tiers(num_blocks=8, num_host_blocks=2)
    sequence = make_sequence(PROMPT, output=[1, 2])
    compute(tiers.manager, sequence, sequence.num_tokens - 1)
    tiers.manager.preempt(sequence)
    sequence.num_preemptions += 1
    tiers.settle()
    fill = make_sequence(range(5000, 5000 + 8 * BLOCK_SIZE))
    assert tiers.manager.allocate(fill, fill.num_tokens)
    tiers.manager.free(fill)
    assert tiers.manager.allocate(sequence, sequence.num_tokens)
    for copy in tiers.host.take_copies():
        tiers.end(copy)
    assert sequence.num_computed_tokens == 2 * BLOCK_SIZE, "its beginning was saved"


def test_saving_does_not_change_who_is_evicted_first() -> None:
    tiers = Tiers(num_blocks=8)
    old, new = range(2 * BLOCK_SIZE), range(100, 100 + 2 * BLOCK_SIZE)
    for prompt in (old, new):
        sequence = make_sequence(prompt)
        compute(tiers.manager, sequence)
        tiers.manager.free(sequence)
    (copy,) = tiers.host.take_copies()  # of the oldest block
    tiers.end(copy)
    fill = make_sequence(OTHER)
    assert tiers.manager.allocate(fill, 6 * BLOCK_SIZE)
    assert len(tiers.manager.match_prefix(make_sequence(new).block_hashes)) == 2
    assert tiers.manager.match_prefix(make_sequence(old).block_hashes) == []


def test_a_save_that_fails_leaves_nothing_to_be_found() -> None:
    tiers = Tiers()
    sequence = make_sequence(PROMPT)
    compute(tiers.manager, sequence)
    tiers.manager.free(sequence)
    (copy,) = tiers.host.take_copies()
    tiers.host.end(copy, None)
    assert tiers.host.tier.num_ready == 0
    assert tiers.host.stats.num_failed_copies == 1
    tiers.manager.check_integrity()


def test_a_block_in_host_memory_alone_stays_announced_until_it_is_dropped_there() -> None:
    tiers = Tiers()
    tiers.run(PROMPT)
    stored = tiers.manager.take_events().stored
    assert len(stored) == 3
    fill = make_sequence(OTHER)
    assert tiers.manager.allocate(fill, 4 * BLOCK_SIZE)
    assert not tiers.manager.take_events()
    assert tiers.manager.cached_hashes() == list(stored)
    tiers.manager.reset_prefix_cache()
    assert set(tiers.manager.take_events().removed) == set(stored)
    assert tiers.manager.cached_hashes() == []


def test_what_is_saved_goes_in_that_order_and_before_what_would_be_lost() -> None:
    """Two prompts are saved, a part of the second by a save of its own: none of it is lost while
    blocks that are saved can go."""
    tiers = Tiers(num_blocks=16)
    prompts = [range(first, first + 4 * BLOCK_SIZE) for first in (100, 200, 300)]
    for prompt in prompts:
        sequence = make_sequence(prompt)
        compute(tiers.manager, sequence)
        tiers.manager.free(sequence)
    while tiers.host.tier.num_ready < 6:  # by twos: all of the first, the leaves of the second
        (copy,) = tiers.host.take_copies()
        assert len(copy.entries) == 2
        tiers.end(copy)
    fill = make_sequence(range(5000, 5000 + 10 * BLOCK_SIZE))
    assert tiers.manager.allocate(fill, fill.num_tokens)
    assert tiers.host.stats.num_lost_blocks == 0
    for prompt, num_left in zip(prompts, (0, 2, 4), strict=True):
        assert len(tiers.manager.match_prefix(make_sequence(prompt).block_hashes)) == num_left


def test_prompts_that_fit_into_both_tiers_are_computed_once() -> None:
    tiers = Tiers(num_blocks=40, num_host_blocks=60)
    prompts = [range(first, first + 5 * BLOCK_SIZE) for first in range(0, 11_000, 1000)]
    for turn in range(3):
        for prompt in prompts:
            sequence = make_sequence(prompt)
            assert tiers.manager.allocate(sequence, sequence.num_tokens)
            tiers.settle()
            assert sequence.num_cached_tokens == (4 * BLOCK_SIZE if turn else 0)
            compute(tiers.manager, sequence)
            tiers.manager.free(sequence)
            tiers.settle()
    assert tiers.host.stats.num_lost_blocks == 0
