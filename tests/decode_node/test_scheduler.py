"""Decode in full, preempt the newest, never get stuck, and every block back at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cluster.errors import ContextLengthExceeded, InternalError, InvalidRequest
from cluster.request import FinishReason
from decode_node.scheduler import DecodeScheduler
from engine.block_manager import BlockManager
from engine.sequence import SequenceStatus
from tests.sequences import BLOCK_SIZE, make_sequence, run_step

if TYPE_CHECKING:
    from engine.schedule import ScheduleDecision
    from engine.sequence import Sequence


def make(
    num_blocks: int = 32, *, budget: int = 8, max_num_seqs: int = 4
) -> tuple[BlockManager, DecodeScheduler]:
    manager = BlockManager(num_blocks, BLOCK_SIZE)
    return manager, DecodeScheduler(manager, budget, max_num_seqs)


def prompt(length: int, first: int) -> range:
    return range(first * 1000, first * 1000 + length)


def arrive(manager: BlockManager, sequence: Sequence, num_computed: int | None = None) -> Sequence:
    """What a hand-off does: the prompt's KV is in place, the first token is known."""
    reservation = manager.reserve(sequence.block_hashes, sequence.num_prompt_tokens)
    assert reservation is not None
    sequence.append_token(next_token(sequence))
    reservation.attach(sequence, num_computed_tokens=num_computed)
    return sequence


def next_token(sequence: Sequence) -> int:
    """As the sampler: a function of the seed and the position."""
    return 500_000 + 1000 * sequence.sampling.seed + sequence.num_tokens


def chunks_of(decision: ScheduleDecision) -> list[tuple[Sequence, int]]:
    return [(chunk.sequence, chunk.num_scheduled_tokens) for chunk in decision.chunks]


def step(manager: BlockManager, scheduler: DecodeScheduler) -> ScheduleDecision:
    decision = scheduler.schedule()
    scheduler.update(run_step(decision, manager, next_token))
    manager.check_integrity()
    return decision


# ---- decode -----------------------------------------------------------------------------


def test_a_handed_over_sequence_decodes_in_the_next_step() -> None:
    manager, scheduler = make()
    sequence = arrive(manager, make_sequence(prompt(6, 1)))
    scheduler.add(sequence)
    decision = scheduler.schedule()
    assert chunks_of(decision) == [(sequence, 1)]
    assert decision.is_decode
    assert sequence.status is SequenceStatus.RUNNING


def test_every_sequence_advances_in_every_decode_step() -> None:
    manager, scheduler = make()
    sequences = [arrive(manager, make_sequence(prompt(6, name))) for name in range(4)]
    for sequence in sequences:
        scheduler.add(sequence)
    for _ in range(5):
        assert len(step(manager, scheduler).chunks) == 4
    assert [sequence.num_output_tokens for sequence in sequences] == [6] * 4


def test_a_finished_sequence_leaves_and_its_blocks_come_back() -> None:
    manager, scheduler = make()
    sequence = arrive(manager, make_sequence(prompt(6, 1), max_tokens=3))
    scheduler.add(sequence)
    step(manager, scheduler)
    output = run_step(scheduler.schedule(), manager)
    assert scheduler.update(output) == [sequence]
    assert sequence.finish_reason is FinishReason.LENGTH
    assert manager.num_free_blocks == 32
    assert not scheduler.has_work()


def test_more_than_fit_into_a_step_wait_with_their_blocks() -> None:
    manager, scheduler = make(max_num_seqs=2)
    first, second, third = (
        arrive(manager, make_sequence(prompt(6, name), max_tokens=2 + name)) for name in range(3)
    )
    for sequence in (first, second, third):
        scheduler.add(sequence)
    assert len(step(manager, scheduler).chunks) == 2
    assert scheduler.num_waiting == 1
    assert chunks_of(scheduler.schedule()) == [(second, 1), (third, 1)]


def test_no_step_has_more_sequences_than_tokens() -> None:
    manager, scheduler = make(budget=2, max_num_seqs=100)
    for name in range(4):
        scheduler.add(arrive(manager, make_sequence(prompt(6, name))))
    assert len(scheduler.schedule().chunks) == 2


# ---- prefill here -----------------------------------------------------------------------


def test_a_prompt_without_kv_is_prefilled_in_chunks_then_decodes() -> None:
    manager, scheduler = make(budget=8)
    sequence = make_sequence(prompt(18, 1), max_tokens=3)
    scheduler.add(sequence)
    sizes = []
    while scheduler.has_work():
        sizes += [chunk.num_scheduled_tokens for chunk in step(manager, scheduler).chunks]
    assert sizes == [8, 8, 2, 1, 1]
    assert sequence.num_output_tokens == 3


def test_prefill_and_decode_steps_alternate_and_never_mix() -> None:
    manager, scheduler = make(budget=8)
    decoding = arrive(manager, make_sequence(prompt(6, 1), max_tokens=50))
    prefilling = make_sequence(prompt(30, 2))
    scheduler.add(decoding)
    scheduler.add(prefilling)
    kinds = [chunks_of(step(manager, scheduler))[0] for _ in range(8)]
    assert kinds == [(decoding, 1), (prefilling, 8)] * 3 + [(decoding, 1), (prefilling, 6)]


def test_a_partly_verified_hand_off_computes_the_rest() -> None:
    manager, scheduler = make(budget=16)
    sequence = arrive(manager, make_sequence(prompt(12, 1)), num_computed=4)
    scheduler.add(sequence)
    assert chunks_of(step(manager, scheduler)) == [(sequence, 9)]
    assert chunks_of(step(manager, scheduler)) == [(sequence, 1)]


def test_a_prompt_that_is_cached_but_for_a_token_is_a_decode_row() -> None:
    manager, scheduler = make()
    scheduler.add(arrive(manager, make_sequence(range(8))))
    scheduler.add(make_sequence([*range(8), 9]))
    decision = scheduler.schedule()
    assert [chunk.num_scheduled_tokens for chunk in decision.chunks] == [1, 1]
    assert decision.is_decode


# ---- out of blocks ----------------------------------------------------------------------


def test_out_of_blocks_the_newest_is_preempted_and_keeps_its_tokens() -> None:
    manager, scheduler = make(4)
    old, new = (arrive(manager, make_sequence(prompt(6, name), seed=name)) for name in (1, 2))
    scheduler.add(old)
    scheduler.add(new)
    for _ in range(2):
        step(manager, scheduler)  # to 8 and 9 tokens: both tables are full
    tokens = list(new.token_ids)
    decision = scheduler.schedule()
    assert chunks_of(decision) == [(old, 1)]
    assert decision.preempted == (new,)
    assert new.status is SequenceStatus.PREEMPTED
    assert new.block_table == []
    assert new.num_computed_tokens == 0
    assert new.token_ids == tokens
    assert new.num_preemptions == 1
    assert scheduler.num_preempted == 1


def test_the_least_urgent_is_preempted_before_the_newest() -> None:
    manager, scheduler = make(4)
    low = arrive(manager, make_sequence(prompt(5, 1), priority=1))
    scheduler.add(low)
    step(manager, scheduler)
    urgent = arrive(manager, make_sequence(prompt(6, 2), priority=0))
    scheduler.add(urgent)
    for _ in range(2):
        step(manager, scheduler)
    decision = scheduler.schedule()
    assert decision.preempted == (low,)
    assert chunks_of(decision) == [(urgent, 1)]


def test_a_preempted_sequence_continues_as_if_nothing_had_happened() -> None:
    def answers(num_blocks: int) -> tuple[list[list[int]], int]:
        manager, scheduler = make(num_blocks)
        sequences = [
            arrive(manager, make_sequence(prompt(6, name), seed=name, max_tokens=12))
            for name in (1, 2, 3)
        ]
        for sequence in sequences:
            scheduler.add(sequence)
        num_preemptions = 0
        while scheduler.has_work():
            num_preemptions += len(step(manager, scheduler).preempted)
        assert manager.num_free_blocks == num_blocks
        return [sequence.output_token_ids for sequence in sequences], num_preemptions

    expected, none = answers(32)
    actual, some = answers(7)
    assert none == 0
    assert some > 0
    assert actual == expected


def test_a_preempted_sequence_resumes_before_new_ones() -> None:
    manager, scheduler = make(4)
    old, new = (arrive(manager, make_sequence(prompt(6, name), max_tokens=4)) for name in (1, 2))
    scheduler.add(old)
    scheduler.add(new)
    for _ in range(3):
        step(manager, scheduler)
    assert new.status is SequenceStatus.PREEMPTED
    waiting = make_sequence(prompt(2, 3), priority=-5)
    scheduler.add(waiting)
    while new.status is SequenceStatus.PREEMPTED:
        step(manager, scheduler)
        assert not (waiting.block_table and new.status is SequenceStatus.PREEMPTED)
    assert old.is_finished


def test_the_last_in_order_waits_a_step_with_its_kv_in_place() -> None:
    manager, scheduler = make(4)
    first = arrive(manager, make_sequence(prompt(4, 1), max_tokens=4))
    second = arrive(manager, make_sequence(prompt(7, 2)))
    scheduler.add(first)
    scheduler.add(second)
    decision = step(manager, scheduler)
    assert len(decision.chunks) == 2
    decision = step(manager, scheduler)
    assert chunks_of(decision) == [(first, 1)], "no block for the second's ninth token"
    assert decision.preempted == ()
    assert len(second.block_table) == 2
    step(manager, scheduler)
    assert first.is_finished
    assert chunks_of(step(manager, scheduler)) == [(second, 1)]


def test_blocks_in_transfer_are_waited_for_not_preempted_for() -> None:
    manager, scheduler = make(3)
    reservation = manager.reserve([], 4)
    assert reservation is not None
    sequence = arrive(manager, make_sequence(prompt(7, 1)))
    scheduler.add(sequence)
    step(manager, scheduler)
    decision = scheduler.schedule()
    assert not decision.chunks
    assert not decision.preempted
    assert not decision.failed
    assert scheduler.has_work()
    reservation.cancel()
    assert chunks_of(scheduler.schedule()) == [(sequence, 1)]


def test_one_that_waits_with_its_blocks_gives_them_to_an_older_one() -> None:
    manager, scheduler = make(4, max_num_seqs=1)
    active = arrive(manager, make_sequence(prompt(8, 1)))
    ready = arrive(manager, make_sequence(prompt(5, 2)))
    scheduler.add(active)
    scheduler.add(ready)
    decision = step(manager, scheduler)
    assert chunks_of(decision) == [(active, 1)]
    assert decision.preempted == (ready,)


def test_a_newcomer_does_not_take_the_blocks_the_active_are_about_to_need() -> None:
    manager, scheduler = make(8)
    active = arrive(manager, make_sequence(prompt(7, 1), max_tokens=20))
    scheduler.add(active)
    step(manager, scheduler)
    newcomer = make_sequence(prompt(24, 2), max_tokens=20)
    scheduler.add(newcomer)
    step(manager, scheduler)
    assert newcomer.status is SequenceStatus.WAITING
    assert manager.num_cached_blocks == 0


def test_a_sequence_that_outgrows_the_pool_fails_alone() -> None:
    manager, scheduler = make(3, max_num_seqs=2)
    large = arrive(manager, make_sequence(prompt(7, 1), max_tokens=50))
    scheduler.add(large)
    small = make_sequence(prompt(3, 2), max_tokens=2)
    scheduler.add(small)
    failed: list[Sequence] = []
    while scheduler.has_work():
        failed += step(manager, scheduler).failed
    assert failed == [large]
    assert isinstance(large.error, ContextLengthExceeded)
    assert large.num_tokens == 13
    assert small.finish_reason is FinishReason.LENGTH
    assert manager.num_free_blocks == 3


def test_one_preempted_just_as_it_outgrew_the_pool_fails_and_blocks_nobody() -> None:
    manager, scheduler = make(3)
    old = arrive(manager, make_sequence(prompt(3, 1), max_tokens=2))
    new = arrive(manager, make_sequence(prompt(7, 2), max_tokens=50))
    scheduler.add(old)
    scheduler.add(new)
    new.token_ids += range(5)  # 13 tokens: more than the pool, and it has not noticed
    scheduler._preempt_after(old)
    waiting = make_sequence(prompt(2, 3), max_tokens=2)
    scheduler.add(waiting)
    failed: list[Sequence] = []
    while scheduler.has_work():
        failed += step(manager, scheduler).failed
    assert failed == [new]
    assert waiting.finish_reason is FinishReason.LENGTH


# ---- leaving ----------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["active", "ready", "waiting", "preempted"])
def test_an_abort_frees_the_blocks_at_once(state: str) -> None:
    manager, scheduler = make(4, max_num_seqs=1 if state == "ready" else 4)
    other = arrive(manager, make_sequence(prompt(6, 1)))
    if state == "waiting":
        sequence = make_sequence(prompt(3, 2))
        scheduler.add(sequence)
    else:
        scheduler.add(other)
        sequence = arrive(manager, make_sequence(prompt(6, 2)))
        scheduler.add(sequence)
        for _ in range(3 if state == "preempted" else 1):
            step(manager, scheduler)
    assert scheduler.abort(sequence.sequence_id) is sequence
    assert sequence.finish_reason is FinishReason.ABORT
    assert scheduler.abort(sequence.sequence_id) is None
    assert scheduler.get(sequence.sequence_id) is None
    scheduler.abort(other.sequence_id)
    manager.free(other)
    assert manager.num_free_blocks == 4
    manager.check_integrity()


def test_the_blocks_of_a_sequence_that_failed_are_not_hit_again() -> None:
    manager, scheduler = make()
    broken = arrive(manager, make_sequence(range(8)))
    scheduler.add(broken)
    output = run_step(scheduler.schedule(), manager)
    broken.fail(InternalError("no usable logits"))
    output.finished_sequences.append(broken)
    assert scheduler.update(output) == [broken]
    assert manager.match_prefix(broken.block_hashes) == []
    assert manager.num_free_blocks == 32


def test_a_sequence_larger_than_the_pool_is_refused_and_stays_the_callers() -> None:
    manager, scheduler = make(2)
    with pytest.raises(ContextLengthExceeded):
        scheduler.add(make_sequence(prompt(9, 1)))
    full = arrive(manager, make_sequence(prompt(8, 1)))
    with pytest.raises(ContextLengthExceeded):
        scheduler.add(full)
    assert not scheduler.has_work()
    assert manager.num_referenced_blocks == 2
    manager.free(full)


def test_the_same_sequence_twice_is_refused() -> None:
    manager, scheduler = make()
    sequence = arrive(manager, make_sequence(prompt(3, 1)))
    scheduler.add(sequence)
    with pytest.raises(InvalidRequest):
        scheduler.add(sequence)
    assert scheduler.num_waiting == 1


def test_queued_tokens_are_those_before_decode() -> None:
    manager, scheduler = make(budget=8)
    scheduler.add(arrive(manager, make_sequence(prompt(6, 1))))
    scheduler.add(make_sequence(prompt(20, 2)))
    assert scheduler.queued_tokens == 19
    step(manager, scheduler)
    step(manager, scheduler)
    assert scheduler.queued_tokens == 11


@pytest.mark.parametrize(("budget", "max_num_seqs"), [(0, 1), (1, 0)])
def test_empty_limits_are_refused(budget: int, max_num_seqs: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        make(budget=budget, max_num_seqs=max_num_seqs)
