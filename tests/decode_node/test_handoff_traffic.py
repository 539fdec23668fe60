"""Hand-offs that wait for blocks beside prompts that are computed here, while steps run ahead: all
of them end, with the right tokens, in whatever order they come, fail and are given up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import ContextLengthExceeded
from decode_node.reservations import Reservations, ReservedBlocks
from decode_node.scheduler import DecodeScheduler
from engine.loop import EngineLoop
from tests.decode_node.test_overlapped_traffic import (
    EOS,
    Listener,
    Traffic,
    contents,
    lengths,
    outputs,
    priorities,
    token_at,
)

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf
    from concurrent.futures import Future

    from cluster.request import TokenDelta
    from engine.schedule import ScheduleDecision
    from engine.sequence import Sequence

ends = st.sampled_from(["start", "start", "recompute", "cancel"])
actions = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), lengths, outputs, contents, priorities),
        st.tuples(st.just("ask"), lengths, outputs, contents, priorities),
        st.tuples(st.just("ask"), lengths, outputs, contents, priorities),
        st.tuples(st.just("end"), ends, st.integers(0, 5), st.integers(0, 6)),
        st.tuples(st.just("end"), ends, st.integers(0, 5), st.integers(0, 6)),
        st.tuples(st.just("give_up"), st.integers(0, 5)),
        st.tuples(st.just("abort"), st.integers(0, 20)),
        st.just(("step",)),
        st.just(("step",)),
        st.just(("step",)),
    ),
    max_size=80,
)


class ServingListener(Listener):
    """As the node's own (`decode_node/loop.py`)."""

    def __init__(self, reservations: Reservations) -> None:
        super().__init__()
        self._reservations = reservations

    def before_step(self, decision: ScheduleDecision) -> None:
        self._reservations.before_step()

    def settled(self, deltas: SequenceOf[TokenDelta]) -> None:
        super().settled(deltas)
        self._reservations.retry()

    def idle(self) -> None:
        self._reservations.retry()


class HandoffTraffic(Traffic):
    def __init__(self, num_blocks: int, budget: int, max_num_seqs: int) -> None:
        super().__init__(num_blocks, budget, max_num_seqs)
        self.scheduler = DecodeScheduler(
            self.manager, budget, max_num_seqs, first_handoff=lambda: self.reservations.first_place
        )
        self.reservations = Reservations(self.manager, self.scheduler)
        self.listener = ServingListener(self.reservations)
        self.loop = EngineLoop(
            self.engine, self.scheduler, self.listener, on_fatal=lambda error: None
        )
        self.loop._wait_for_blocks = self.listener.idle  # type: ignore[method-assign]
        self.asked: list[tuple[Sequence, Future[ReservedBlocks]]] = []
        self.num_made = 0

    def make(self, length: int, num_output: int, first: int, priority: int) -> Sequence:
        self.num_made += 1
        return super().make(length, num_output, first, priority)

    def ask(self, length: int, num_output: int, first: int, priority: int) -> None:
        sequence = self.make(length, max(2, num_output), first, priority)
        if token_at(sequence, 0) == EOS:
            return  # ends where it was prefilled
        try:
            self.asked.append((sequence, self.reservations.ask(sequence)))
        except ContextLengthExceeded:
            return

    def end(self, how: str, index: int, num_good_blocks: int) -> None:
        """Of a hand-off that has its blocks."""
        with_blocks = [each for each in self.asked if each[1].done()]
        if not with_blocks:
            return
        sequence, asking = with_blocks[index % len(with_blocks)]
        self.asked.remove((sequence, asking))
        blocks = asking.result()
        written = set(blocks.block_ids[blocks.num_held_blocks :])
        assert not written & self.engine.touched, "a transfer has written under a running step"
        if how == "cancel":
            self.reservations.cancel(sequence.sequence_id)
            return
        if how == "start":
            self.reservations.start(sequence.sequence_id, token_at(sequence, 0))
        else:
            num_good = min(max(num_good_blocks, blocks.num_held_blocks), len(blocks.block_ids))
            self.reservations.start_partly(sequence.sequence_id, num_good)
        self.add(sequence)
        self.reservations.retry()

    def give_up(self, index: int) -> None:
        """One that still waits for blocks."""
        waiting = [each for each in self.asked if not each[1].done()]
        if waiting:
            sequence, asking = waiting[index % len(waiting)]
            self.asked.remove((sequence, asking))
            self.reservations.cancel(sequence.sequence_id)

    def abort(self, index: int) -> None:
        super().abort(index)
        self.reservations.retry()

    def drain(self) -> None:
        """No hand-off is given up any more: each that gets its blocks starts."""
        for _ in range(3000):
            if not (self.loop._is_busy() or self.asked):
                break
            self.step()
            if self.loop._flight is None:
                self.listener.idle()
                self.end("start", 0, 0)
        assert not self.loop._is_busy(), "somebody waits for ever"
        assert not self.asked, "a hand-off waits for ever"
        assert self.reservations.num_waiting == self.reservations.num_reserved == 0
        self.check()


@settings(max_examples=150, deadline=None)
@given(actions, st.integers(6, 24), st.integers(1, 12), st.integers(1, 5))
def test_any_traffic_of_hand_offs_and_own_prompts_ends(
    plan: list[tuple[object, ...]], num_blocks: int, budget: int, max_num_seqs: int
) -> None:
    traffic = HandoffTraffic(num_blocks, budget, max_num_seqs)
    for name, *arguments in plan:
        getattr(traffic, str(name))(*arguments)
    traffic.drain()
