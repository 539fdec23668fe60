"""Steps launched before the last one is collected: any traffic gives the tokens of a loop that
never does that, and no transfer is given a block that a step in flight may still touch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import ContextLengthExceeded
from cluster.request import FinishReason, TokenDelta
from decode_node.scheduler import DecodeScheduler
from engine.block_manager import BlockManager
from engine.loop import EngineLoop
from engine.step_pipeline import StepOutput
from tests.sequences import (
    BLOCK_SIZE,
    Flight,
    collect_step,
    launch_step,
    make_sequence,
)

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from engine.reservation import Reservation
    from engine.schedule import ScheduleDecision
    from engine.sequence import Sequence

EOS = 7


def token_at(sequence: Sequence, index: int) -> int:
    """Output token `index`: a function of the sequence, as with a real model. Some are ends."""
    seed = sequence.sampling.seed
    return EOS if (seed * 31 + index * index * 7) % 11 == 3 else 1000 * (seed + 1) + index


def expected_tokens(sequence: Sequence) -> list[int]:
    """What a loop that collects each step before the next one puts out."""
    tokens: list[int] = []
    while len(tokens) < sequence.sampling.max_tokens and (not tokens or tokens[-1] != EOS):
        tokens.append(token_at(sequence, len(tokens)))
    return tokens


class ScriptedEngine:
    """Up to two steps in flight. A token is decided when its step is launched, by what the
    sequence then has and what is in flight: as on a device, where it cannot be changed later."""

    def __init__(self, block_manager: BlockManager) -> None:
        self.block_manager = block_manager
        self.in_flight: list[tuple[Flight, dict[Sequence, int], set[int]]] = []
        self.overlaps = 0

    def launch(self, decision: ScheduleDecision, *, on_layer: object = None) -> Flight:
        assert len(self.in_flight) < 2
        self.overlaps += bool(self.in_flight)
        drawn = {
            chunk.sequence: token_at(
                chunk.sequence,
                chunk.sequence.num_output_tokens + chunk.sequence.num_launched_draws,
            )
            for chunk in decision.chunks
            if chunk.samples
        }
        touched = {block for chunk in decision.chunks for block in chunk.sequence.block_table}
        flight = launch_step(decision, self.block_manager, can_be_followed=True)
        self.in_flight.append((flight, drawn, touched))
        return flight

    def collect(self, step: Flight) -> StepOutput:
        flight, drawn, _ = self.in_flight.pop(0)
        assert flight is step
        outcome = collect_step(flight, self.block_manager, drawn.__getitem__, eos_token_ids={EOS})
        deltas = tuple(
            TokenDelta(each.sequence_id, (each.token_ids[-1],), finish_reason=each.finish_reason)
            for each in outcome.sampled_sequences
        )
        return StepOutput(
            deltas,
            tuple(outcome.sampled_sequences),
            tuple(outcome.finished_sequences),
            outcome.chunks,
        )

    @property
    def touched(self) -> set[int]:
        return {block for _, _, blocks in self.in_flight for block in blocks}


class Listener:
    def __init__(self) -> None:
        self.deltas: list[TokenDelta] = []

    def before_step(self, decision: ScheduleDecision) -> None: ...
    def after_step(self, decision: ScheduleDecision, output: StepOutput) -> None: ...

    def idle(self) -> None:
        pass

    def settled(self, deltas: SequenceOf[TokenDelta]) -> None:
        self.deltas.extend(deltas)


class Traffic:
    """One decode node whose loop is driven step by step."""

    def __init__(self, num_blocks: int, budget: int, max_num_seqs: int) -> None:
        self.manager = BlockManager(num_blocks, BLOCK_SIZE)
        self.scheduler = DecodeScheduler(self.manager, budget, max_num_seqs)
        self.engine = ScriptedEngine(self.manager)
        self.listener = Listener()
        self.loop = EngineLoop(
            self.engine, self.scheduler, self.listener, on_fatal=lambda error: None
        )
        self.loop._wait_for_blocks = lambda: None  # type: ignore[method-assign]
        self.added: list[Sequence] = []
        self.reserved: list[tuple[Sequence, Reservation]] = []
        self.aborted: set[str] = set()

    def submit(self, length: int, num_output: int, first: int, priority: int) -> None:
        self.add(self.make(length, num_output, first, priority))

    def reserve(self, length: int, num_output: int, first: int, priority: int) -> None:
        sequence = self.make(length, max(2, num_output), first, priority)
        if token_at(sequence, 0) == EOS:
            return  # ends where it was prefilled
        reservation = self.manager.reserve(sequence.block_hashes, length)
        if reservation is not None:
            ours = set(reservation.block_ids[reservation.num_held_blocks :])
            assert not ours & self.engine.touched, "a transfer would write under a running step"
            self.reserved.append((sequence, reservation))

    def commit(self, succeeds: bool) -> None:
        if not self.reserved:
            return
        sequence, reservation = self.reserved.pop(0)
        if succeeds:
            sequence.append_token(token_at(sequence, 0))
            reservation.attach(sequence)
            self.add(sequence)
        else:
            reservation.cancel()

    def abort(self, index: int) -> None:
        if index < len(self.added):
            sequence = self.scheduler.abort(self.added[index].sequence_id)
            if sequence is not None:
                self.aborted.add(sequence.sequence_id)

    def step(self) -> None:
        if self.loop._is_busy():
            self.loop._step()
            self.manager.check_integrity()

    def drain(self) -> None:
        for _ in range(2000):
            if not self.loop._is_busy():
                break
            before = len(self.listener.deltas)
            self.step()
            if len(self.listener.deltas) == before and self.loop._flight is None:
                self.commit(succeeds=False)
        assert not self.loop._is_busy(), "stuck"
        while self.reserved:
            self.commit(succeeds=False)
        self.check()

    def check(self) -> None:
        assert self.manager.num_free_blocks == self.manager.num_blocks
        seen: dict[str, list[TokenDelta]] = {}
        for delta in self.listener.deltas:
            seen.setdefault(delta.sequence_id, []).append(delta)
        for sequence in self.added:
            deltas = seen.get(sequence.sequence_id, [])
            handed = sequence.num_output_tokens - sum(len(delta.token_ids) for delta in deltas)
            assert handed in (0, 1), "every token but that of the prefill node is said once"
            told = [token for delta in deltas for token in delta.token_ids]
            assert sequence.output_token_ids[handed:] == told
            expected = expected_tokens(sequence)
            assert (sequence.num_launched_draws, sequence.num_launched_tokens) == (0, 0)
            if sequence.sequence_id in self.aborted:
                assert sequence.output_token_ids == expected[: sequence.num_output_tokens]
                assert all(delta.finish_reason is None for delta in deltas)
            elif sequence.error is None:
                assert sequence.output_token_ids == expected
                ends = [delta.finish_reason is not None for delta in deltas]
                assert ends == [False] * (len(deltas) - 1) + [True]
                at_end = FinishReason.STOP if expected[-1] == EOS else FinishReason.LENGTH
                assert sequence.finish_reason is at_end

    def make(self, length: int, num_output: int, first: int, priority: int) -> Sequence:
        prompt = range(first * 1000, first * 1000 + length)
        seed = len(self.added) + len(self.reserved)
        return make_sequence(prompt, max_tokens=num_output, priority=priority, seed=seed)

    def add(self, sequence: Sequence) -> None:
        try:
            self.scheduler.add(sequence)
        except ContextLengthExceeded:
            self.manager.free(sequence)
        else:
            self.added.append(sequence)


lengths, outputs, contents = st.integers(1, 24), st.integers(1, 20), st.integers(0, 2)
priorities = st.integers(-1, 1)
actions = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), lengths, outputs, contents, priorities),
        st.tuples(st.just("reserve"), lengths, outputs, contents, priorities),
        st.tuples(st.just("commit"), st.booleans()),
        st.tuples(st.just("abort"), st.integers(0, 20)),
        st.just(("step",)),
        st.just(("step",)),
        st.just(("step",)),
    ),
    max_size=80,
)


@settings(max_examples=300, deadline=None)
@given(actions, st.integers(6, 24), st.integers(1, 12), st.integers(1, 5))
def test_any_overlapped_traffic_gives_the_tokens_of_a_loop_that_waits(
    plan: list[tuple[object, ...]], num_blocks: int, budget: int, max_num_seqs: int
) -> None:
    traffic = Traffic(num_blocks, budget, max_num_seqs)
    for name, *arguments in plan:
        getattr(traffic, str(name))(*arguments)
    traffic.drain()


def test_decode_steps_are_launched_ahead_and_hand_offs_join_without_a_pause() -> None:
    traffic = Traffic(64, 64, 8)
    for seed in range(3):
        traffic.reserve(5, 18, seed, 0)
        traffic.commit(succeeds=True)
    before = traffic.engine.overlaps
    for _ in range(4):
        traffic.step()
    assert traffic.engine.overlaps == before + 4
    traffic.reserve(6, 18, 2, 0)
    traffic.commit(succeeds=True)
    traffic.step()
    flight, _, _ = traffic.engine.in_flight[-1]
    assert traffic.added[-1] in flight.sampled
    assert traffic.engine.overlaps == before + 5
    traffic.drain()


def test_no_step_goes_beyond_a_limit_that_is_known_before() -> None:
    traffic = Traffic(64, 64, 8)
    sequence = make_sequence(range(5), max_tokens=3, seed=0)
    assert EOS not in expected_tokens(sequence)
    traffic.add(sequence)
    steps = 0
    while traffic.loop._is_busy():
        traffic.step()
        steps += 1
    assert steps == 3
    traffic.check()
