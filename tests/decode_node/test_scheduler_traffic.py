"""Any traffic on a decode node ends with the right tokens and all blocks back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import example, given, settings
from hypothesis import strategies as st

from cluster.errors import ContextLengthExceeded
from decode_node.scheduler import DecodeScheduler
from engine.block_manager import BlockManager
from engine.sequence import SequenceStatus
from tests.sequences import BLOCK_SIZE, make_sequence, run_step

if TYPE_CHECKING:
    from engine.block_copies import BlockCopy
    from engine.reservation import Reservation
    from engine.sequence import Sequence


def prompt(length: int, first: int) -> range:
    return range(first * 1000, first * 1000 + length)


def next_token(sequence: Sequence) -> int:
    """As the sampler: a function of the seed and the position."""
    return 500_000 + 1000 * sequence.sampling.seed + sequence.num_tokens


lengths, outputs, contents = st.integers(1, 24), st.integers(1, 20), st.integers(0, 2)
priorities = st.integers(-1, 1)
actions = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), lengths, outputs, contents, priorities),
        st.tuples(st.just("reserve"), lengths, outputs, contents, priorities),
        st.tuples(st.just("commit"), st.booleans()),
        st.tuples(st.just("abort"), st.integers(0, 20)),
        st.tuples(st.just("copy"), st.integers(0, 5), st.sampled_from(["good", "good", "failed"])),
        st.just(("step",)),
        st.just(("step",)),
        st.just(("step",)),
    ),
    max_size=80,
)


@settings(max_examples=200, deadline=None)
@given(actions, st.integers(6, 20), st.integers(1, 12), st.integers(1, 5), st.integers(0, 24))
@example(
    # The only place is taken by one that can grow no further, and the block that it lacks is held
    # by a hand-off before it in order.
    plan=[
        ("submit", 2, 20, 0, 1),
        ("reserve", 1, 1, 0, 0),
        ("submit", 1, 1, 0, 1),
        ("step",),
        ("commit", True),
    ],
    num_blocks=6,
    budget=1,
    max_num_seqs=1,
    num_host_blocks=0,
)
def test_any_traffic_ends_with_the_right_tokens_and_all_blocks_back(
    plan: list[tuple[object, ...]],
    num_blocks: int,
    budget: int,
    max_num_seqs: int,
    num_host_blocks: int,
) -> None:
    traffic = Traffic(num_blocks, budget, max_num_seqs, num_host_blocks)
    for name, *arguments in plan:
        getattr(traffic, str(name))(*arguments)
    traffic.drain()


class Traffic:
    """One decode node: hand-offs and own prompts come, steps run, clients give up; and copies to
    and from host memory, if it has some, end whenever they like."""

    def __init__(
        self, num_blocks: int, budget: int, max_num_seqs: int, num_host_blocks: int
    ) -> None:
        self.manager = BlockManager(num_blocks, BLOCK_SIZE, num_host_blocks=num_host_blocks)
        self.copies: list[BlockCopy] = []
        self.scheduler = DecodeScheduler(self.manager, budget, max_num_seqs)
        self.budget, self.max_num_seqs = budget, max_num_seqs
        self.added: list[Sequence] = []
        self.ended: list[Sequence] = []
        self.reserved: list[tuple[Sequence, Reservation]] = []
        self.num_idle = 0

    def submit(self, length: int, num_output: int, first: int, priority: int) -> None:
        self.add(self.make(length, num_output, first, priority))

    def reserve(self, length: int, num_output: int, first: int, priority: int) -> None:
        sequence = self.make(length, max(2, num_output), first, priority)
        reservation = self.manager.reserve(sequence.block_hashes, length)
        if reservation is not None:
            self.reserved.append((sequence, reservation))

    def commit(self, succeeds: bool) -> None:
        if not self.reserved:
            return
        sequence, reservation = self.reserved.pop(0)
        if succeeds:
            sequence.append_token(next_token(sequence))
            reservation.attach(sequence)
            self.add(sequence)
        else:
            reservation.cancel()

    def abort(self, index: int) -> None:
        if index < len(self.added):
            sequence = self.scheduler.abort(self.added[index].sequence_id)
            if sequence is not None:
                self.ended.append(sequence)

    def copy(self, index: int, outcome: str) -> None:
        """One of the copies ends."""
        host = self.manager.host
        if host is None:
            return
        self.copies += host.take_copies()
        if self.copies:
            copy = self.copies.pop(index % len(self.copies))
            host.end(copy, None if outcome == "failed" else [0] * len(copy.entries))

    def step(self) -> None:
        could_decode = self.decoding()
        preempted = self.without_blocks(SequenceStatus.PREEMPTED)
        new = self.without_blocks(SequenceStatus.WAITING)
        decision = self.scheduler.schedule()
        self.ended += decision.failed
        assert decision.num_scheduled_tokens <= self.budget
        assert len(decision.chunks) <= self.max_num_seqs
        assert self.scheduler.num_running <= self.max_num_seqs
        assert decision.is_decode or all(
            chunk.sequence.num_uncomputed_tokens > 1 for chunk in decision.chunks
        ), "decode rows in a prefill step"
        assert not any(chunk.sequence.is_loading for chunk in decision.chunks)
        scheduled = {chunk.sequence for chunk in decision.chunks}
        assert len(scheduled) == len(decision.chunks)
        assert not scheduled & {*decision.preempted, *decision.failed}
        if decision.is_decode and decision.chunks:
            for sequence in could_decode - scheduled:
                assert self.has_no_room(sequence) or sequence in decision.failed
        passed_over = [s for s in preempted if s not in decision.preempted and not s.block_table]
        if passed_over:
            assert not any(s.block_table for s in new), "resume before new ones"
        self.num_idle = 0 if decision.chunks or decision.failed else self.num_idle + 1
        output = run_step(decision, self.manager, next_token)
        self.ended += self.scheduler.update(output)
        self.manager.check_integrity()

    def drain(self) -> None:
        while self.scheduler.has_work():
            self.step()
            if self.num_idle:
                self.release_something()
        while self.reserved:
            self.commit(succeeds=False)
        self.copy(0, "good")
        while self.copies:
            self.copy(0, "good")
        assert len(self.ended) == len(set(self.ended)) == len(self.added)
        for sequence in self.ended:
            expected = [self.token_at(sequence, i) for i in range(sequence.num_output_tokens)]
            assert sequence.output_token_ids == expected
            assert (sequence.finish_reason is None) != (sequence.error is None)
        assert self.manager.num_free_blocks == self.manager.num_blocks

    def release_something(self) -> None:
        """Nobody goes on: then something that ends by itself holds blocks."""
        if self.manager.host is not None:
            self.copies += self.manager.host.take_copies()
        assert self.copies or self.reserved, "stuck, though nothing outside holds blocks"
        if self.copies:
            self.copy(0, "good")
        else:
            self.commit(succeeds=False)

    def make(self, length: int, num_output: int, first: int, priority: int) -> Sequence:
        return make_sequence(
            prompt(length, first), max_tokens=num_output, priority=priority, seed=len(self.added)
        )

    def add(self, sequence: Sequence) -> None:
        try:
            self.scheduler.add(sequence)
        except ContextLengthExceeded:
            self.manager.free(sequence)
        else:
            self.added.append(sequence)

    def decoding(self) -> set[Sequence]:
        return {
            sequence
            for sequence in self.scheduler.sequences()
            if sequence.status is SequenceStatus.RUNNING
            and sequence.num_uncomputed_tokens == 1
            and not sequence.is_loading
        }

    def without_blocks(self, status: SequenceStatus) -> list[Sequence]:
        sequences = self.scheduler.sequences()
        return [s for s in sequences if s.status is status and not s.block_table]

    def has_no_room(self, sequence: Sequence) -> bool:
        needed = self.manager.num_blocks_for(sequence.num_tokens) - len(sequence.block_table)
        return needed > 0

    @staticmethod
    def token_at(sequence: Sequence, index: int) -> int:
        return 500_000 + 1000 * sequence.sampling.seed + sequence.num_prompt_tokens + index
