"""Prompts in their turn, in chunks, and every block back at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import ContextLengthExceeded, InternalError, InvalidRequest
from cluster.request import FinishReason
from engine.block_manager import BlockManager
from engine.sequence import SequenceStatus
from engine.waiting_queue import order_key
from prefill_node.scheduler import PrefillScheduler
from tests.sequences import (
    BLOCK_SIZE,
    StepOutcome,
    collect_step,
    launch_step,
    make_sequence,
    run_step,
)

if TYPE_CHECKING:
    from engine.reservation import Hold
    from engine.schedule import ScheduleDecision
    from engine.sequence import Sequence


def make(
    num_blocks: int = 32, *, budget: int = 8, max_num_seqs: int = 4
) -> tuple[BlockManager, PrefillScheduler]:
    manager = BlockManager(num_blocks, BLOCK_SIZE)
    return manager, PrefillScheduler(manager, budget, max_num_seqs)


def chunks_of(decision: ScheduleDecision) -> list[tuple[Sequence, int]]:
    return [(chunk.sequence, chunk.num_scheduled_tokens) for chunk in decision.chunks]


def prompt(length: int, first: int) -> range:
    return range(first * 1000, first * 1000 + length)


def test_the_budget_is_filled_in_order_of_arrival_and_the_rest_goes_on() -> None:
    manager, scheduler = make(budget=8)
    first, second = make_sequence(prompt(5, 1)), make_sequence(prompt(9, 2))
    scheduler.add(first)
    scheduler.add(second)
    decision = scheduler.schedule()
    assert chunks_of(decision) == [(first, 5), (second, 3)]
    output = run_step(decision, manager)
    assert scheduler.update(output) == [first]
    assert chunks_of(scheduler.schedule()) == [(second, 6)]
    assert scheduler.num_running == 1


def test_the_next_chunk_of_a_long_prompt_is_cut_while_one_is_in_flight() -> None:
    manager, scheduler = make(budget=8)
    sequence = make_sequence(prompt(20, 1))
    scheduler.add(sequence)
    first = launch_step(scheduler.schedule(), manager)
    ahead = scheduler.schedule_ahead()
    assert ahead is not None
    assert [(chunk.begin, chunk.num_scheduled_tokens) for chunk in ahead.chunks] == [(8, 8)]
    second = launch_step(ahead, manager)
    scheduler.update(collect_step(first, manager))
    assert scheduler.schedule_ahead() is None, "four tokens: others may share that step"
    scheduler.update(collect_step(second, manager))
    assert chunks_of(scheduler.schedule()) == [(sequence, 4)]


def test_no_prompt_is_admitted_while_a_step_is_in_flight() -> None:
    """It may begin with the very blocks that the step computes."""
    manager, scheduler = make(budget=8)
    first, second = make_sequence(prompt(9, 1)), make_sequence(prompt(20, 1))
    scheduler.add(first)
    flight = launch_step(scheduler.schedule(), manager)
    scheduler.add(second)
    assert scheduler.schedule_ahead() is None
    scheduler.update(collect_step(flight, manager))
    assert chunks_of(scheduler.schedule()) == [(first, 1), (second, 7)]
    assert second.num_cached_tokens == 8


def test_a_more_urgent_prompt_is_not_kept_waiting_behind_two_steps() -> None:
    manager, scheduler = make(budget=8)
    scheduler.add(make_sequence(prompt(40, 1)))
    launch_step(scheduler.schedule(), manager)
    assert scheduler.schedule_ahead() is not None
    scheduler.add(make_sequence(prompt(4, 2), priority=-1))
    assert scheduler.schedule_ahead() is None


def test_a_prompt_longer_than_the_budget_is_cut() -> None:
    manager, scheduler = make(budget=8)
    sequence = make_sequence(prompt(20, 1))
    scheduler.add(sequence)
    sizes = []
    while scheduler.has_work():
        decision = scheduler.schedule()
        sizes += [chunk.num_scheduled_tokens for chunk in decision.chunks]
        scheduler.update(run_step(decision, manager))
    assert sizes == [8, 8, 4]
    assert sequence.num_output_tokens == 1


def test_a_step_has_at_most_max_num_seqs_sequences() -> None:
    _, scheduler = make(budget=100, max_num_seqs=2)
    for name in range(3):
        scheduler.add(make_sequence(prompt(2, name)))
    assert len(scheduler.schedule().chunks) == 2
    assert scheduler.num_waiting == 1


def test_a_step_behind_another_has_at_most_max_num_seqs_sequences() -> None:
    manager, scheduler = make(budget=8, max_num_seqs=2)
    halfway = [make_sequence(prompt(11, name), priority=-name) for name in range(2)]
    for sequence in halfway:  # the second overtakes the first, which has begun
        scheduler.add(sequence)
        scheduler.update(run_step(scheduler.schedule(), manager))
    urgent = make_sequence(prompt(12, 2), priority=-2)
    scheduler.add(urgent)
    launch_step(scheduler.schedule(), manager)
    ahead = scheduler.schedule_ahead()
    assert ahead is not None
    assert chunks_of(ahead) == [(urgent, 4), (halfway[1], 3)]


def test_the_urgent_overtake_even_one_that_is_halfway() -> None:
    manager, scheduler = make(budget=8)
    slow = make_sequence(prompt(20, 1))
    scheduler.add(slow)
    scheduler.update(run_step(scheduler.schedule(), manager))
    urgent = make_sequence(prompt(6, 2), priority=-1)
    scheduler.add(urgent)
    assert chunks_of(scheduler.schedule()) == [(urgent, 6), (slow, 2)]


def test_nobody_overtakes_a_prompt_that_waits_for_blocks() -> None:
    manager, scheduler = make(4, budget=16)
    running = make_sequence(prompt(8, 1))
    scheduler.add(running)
    run_step(scheduler.schedule(), manager)
    hold = manager.hold(running.block_table, "transfer")
    scheduler.update(StepOutcome([running], []))
    large, small = make_sequence(prompt(12, 2)), make_sequence(prompt(2, 3))
    scheduler.add(large)
    scheduler.add(small)
    assert scheduler.schedule().chunks == ()
    assert scheduler.has_work()
    hold.release()
    assert chunks_of(scheduler.schedule()) == [(large, 12), (small, 2)]


def test_one_halfway_goes_on_while_an_urgent_one_waits_for_blocks() -> None:
    manager, scheduler = make(6, budget=8)
    slow = make_sequence(prompt(20, 1))
    scheduler.add(slow)
    scheduler.update(run_step(scheduler.schedule(), manager))
    scheduler.add(make_sequence(prompt(12, 2), priority=-1))
    assert chunks_of(scheduler.schedule()) == [(slow, 8)]


def test_a_cached_prefix_is_not_computed_again() -> None:
    manager, scheduler = make(budget=16)
    first, second = make_sequence(range(9)), make_sequence(range(9))
    scheduler.add(first)
    scheduler.update(run_step(scheduler.schedule(), manager))
    scheduler.add(second)
    assert chunks_of(scheduler.schedule()) == [(second, 1)]
    assert second.num_cached_tokens == 8


def test_a_prompt_leaves_with_its_first_token_and_drops_its_blocks() -> None:
    manager, scheduler = make()
    sequence = make_sequence(prompt(5, 1))
    scheduler.add(sequence)
    decision = scheduler.schedule()
    output = run_step(decision, manager)
    hold = manager.hold(sequence.block_table, "transfer")
    assert scheduler.update(output) == [sequence]
    assert scheduler.get(sequence.sequence_id) is None
    assert not scheduler.has_work()
    assert manager.num_referenced_blocks == 2, "those that are sent stay"
    hold.release()
    assert manager.num_free_blocks == 32


def test_a_prompt_that_ends_in_its_first_step_leaves_too() -> None:
    manager, scheduler = make()
    sequence = make_sequence(prompt(5, 1), max_tokens=1)
    scheduler.add(sequence)
    assert scheduler.update(run_step(scheduler.schedule(), manager)) == [sequence]
    assert sequence.finish_reason is FinishReason.LENGTH
    assert manager.num_free_blocks == 32


def test_the_blocks_of_a_sequence_that_failed_are_not_hit_again() -> None:
    manager, scheduler = make()
    broken, next_one = make_sequence(range(9)), make_sequence(range(9))
    scheduler.add(broken)
    output = run_step(scheduler.schedule(), manager)
    broken.fail(InternalError("no usable logits"))
    scheduler.update(output)
    scheduler.add(next_one)
    scheduler.schedule()
    assert next_one.num_cached_tokens == 0
    assert not manager.take_events()


@pytest.mark.parametrize("is_running", [False, True])
def test_an_abort_frees_the_blocks_at_once(is_running: bool) -> None:
    manager, scheduler = make()
    sequence = make_sequence(prompt(20, 1))
    scheduler.add(sequence)
    if is_running:
        scheduler.update(run_step(scheduler.schedule(), manager))
    assert scheduler.abort(sequence.sequence_id) is sequence
    assert sequence.finish_reason is FinishReason.ABORT
    assert manager.num_free_blocks == 32
    assert not scheduler.has_work()
    assert scheduler.abort(sequence.sequence_id) is None


def test_a_prompt_larger_than_the_pool_is_refused() -> None:
    _, scheduler = make(4)
    with pytest.raises(ContextLengthExceeded, match="holds 16"):
        scheduler.add(make_sequence(prompt(17, 1)))
    scheduler.add(make_sequence(prompt(16, 1)))
    assert scheduler.schedule().chunks


def test_the_same_sequence_twice_is_refused() -> None:
    _, scheduler = make()
    sequence = make_sequence(prompt(3, 1))
    scheduler.add(sequence)
    with pytest.raises(InvalidRequest):
        scheduler.add(sequence)
    assert scheduler.num_waiting == 1


def test_queued_tokens_are_those_not_computed_yet() -> None:
    manager, scheduler = make(budget=8)
    scheduler.add(make_sequence(prompt(10, 1)))
    scheduler.add(make_sequence(prompt(7, 2)))
    assert scheduler.queued_tokens == 17
    scheduler.update(run_step(scheduler.schedule(), manager))
    assert scheduler.queued_tokens == 9


@pytest.mark.parametrize(("budget", "max_num_seqs"), [(0, 1), (1, 0)])
def test_empty_limits_are_refused(budget: int, max_num_seqs: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        make(budget=budget, max_num_seqs=max_num_seqs)


actions = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 30), st.integers(0, 2), st.integers(-1, 1)),
        st.tuples(st.just("abort"), st.integers(0, 20)),
        st.just(("step",)),
        st.just(("release",)),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(actions, st.integers(8, 24), st.integers(1, 20), st.integers(1, 4))
def test_any_traffic_is_served_in_order_and_gives_all_blocks_back(
    plan: list[tuple[object, ...]], num_blocks: int, budget: int, max_num_seqs: int
) -> None:
    cluster = Traffic(num_blocks, budget, max_num_seqs)
    for name, *arguments in plan:
        getattr(cluster, str(name))(*arguments)
    cluster.drain()


class Traffic:
    """One prefill node whose transfers end when told to."""

    def __init__(self, num_blocks: int, budget: int, max_num_seqs: int) -> None:
        self.manager, self.scheduler = make(num_blocks, budget=budget, max_num_seqs=max_num_seqs)
        self.budget, self.max_num_seqs = budget, max_num_seqs
        self.added: list[Sequence] = []
        self.ended: list[Sequence] = []
        self.admitted: list[Sequence] = []
        self.holds: list[Hold] = []

    def add(self, length: int, first: int, priority: int) -> None:
        sequence = make_sequence(prompt(length, first), priority=priority)
        self.scheduler.add(sequence)
        self.added.append(sequence)

    def abort(self, index: int) -> None:
        if index < len(self.added):
            sequence = self.scheduler.abort(self.added[index].sequence_id)
            if sequence is not None:
                self.ended.append(sequence)

    def step(self) -> None:
        waiting = {s for s in self.scheduler.sequences() if s.status is SequenceStatus.WAITING}
        decision = self.scheduler.schedule()
        assert decision.num_scheduled_tokens <= self.budget
        assert len(decision.chunks) <= self.max_num_seqs
        order = [order_key(chunk.sequence) for chunk in decision.chunks]
        assert order == sorted(order)
        admitted = {s for s in waiting if s.status is SequenceStatus.RUNNING}
        left_waiting = [order_key(s) for s in waiting - admitted]
        assert all(order_key(s) < min(left_waiting, default=(*order_key(s), 1)) for s in admitted)
        output = run_step(decision, self.manager)
        leaving = list(output.sampled_sequences)
        self.holds += [self.manager.hold(s.block_table, "transfer") for s in leaving]
        assert self.scheduler.update(output) == leaving
        self.ended += leaving
        self.manager.check_integrity()

    def release(self) -> None:
        if self.holds:
            self.holds.pop(0).release()

    def drain(self) -> None:
        while self.scheduler.has_work():
            before = self.scheduler.queued_tokens
            self.step()
            if self.scheduler.queued_tokens == before:
                assert self.holds, "stuck, though nothing outside holds blocks"
                self.release()
        while self.holds:
            self.release()
        assert len(self.ended) == len(set(self.ended)) == len(self.added)
        assert self.manager.num_free_blocks == self.manager.num_blocks
        self.manager.check_integrity()
