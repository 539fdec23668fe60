"""Which prompt tokens the next step computes.

Life of a prompt here
    1. `add`: it waits, by priority, then arrival. Nothing is pinned for it.
    2. Its turn comes when blocks for all of it are free, so it can never get stuck halfway.
       The one at the head waits for them; none overtakes it.
       If its prefix goes on in host memory, those blocks are loaded first; others run meanwhile,
       and while a step is full the next in line gets its blocks already, to be loaded behind it.
    3. `schedule` cuts chunks until the token budget of the step is used up. What is left of a
       prompt goes on in the next step, in its turn.
    4. While a step is in flight, `schedule_ahead` cuts the next chunks of a long prompt.
    5. `update`: its first token was sampled, or it ended. It leaves, and drops its blocks;
       those that are still being sent stay under the sender's holds.

Pure: no clock, no tensors. The state is the queue, the running list and the block manager.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from typing import TYPE_CHECKING

from cluster.errors import InvalidRequest
from cluster.request import FinishReason
from engine.schedule import ScheduledChunk, ScheduleDecision, check_fits
from engine.sequence import SequenceStatus
from engine.waiting_queue import WaitingQueue, order_key

if TYPE_CHECKING:
    from collections.abc import Iterator

    from engine.block_manager import BlockManager
    from engine.schedule import StepResult
    from engine.sequence import Sequence


class PrefillScheduler:
    """Chunked prefill in order. Owns the sequences between `add` and `update` or `abort`."""

    def __init__(
        self, block_manager: BlockManager, max_num_batched_tokens: int, max_num_seqs: int
    ) -> None:
        if max_num_batched_tokens < 1 or max_num_seqs < 1:
            raise ValueError("max_num_batched_tokens and max_num_seqs must be positive.")
        self._block_manager = block_manager
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_num_seqs = max_num_seqs
        self._sequences: dict[str, Sequence] = {}
        self._waiting = WaitingQueue()
        self._running: list[Sequence] = []  # by order_key; they have all their blocks
        self._num_arrivals = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def queued_tokens(self) -> int:
        """Tokens still to be computed."""
        return sum(sequence.num_uncomputed_tokens for sequence in self._sequences.values())

    def has_work(self) -> bool:
        return bool(self._sequences)

    def get(self, sequence_id: str) -> Sequence | None:
        return self._sequences.get(sequence_id)

    def sequences(self) -> tuple[Sequence, ...]:
        return tuple(self._sequences.values())

    def add(self, sequence: Sequence) -> None:
        """Queue a new prompt. Raises what can never run here."""
        if sequence.sequence_id in self._sequences:
            raise InvalidRequest("A sequence with this id is running.", param="sequence_id")
        check_fits(sequence, self._block_manager)
        sequence.arrival = self._num_arrivals
        self._num_arrivals += 1
        self._sequences[sequence.sequence_id] = sequence
        self._waiting.push(sequence)

    def abort(self, sequence_id: str) -> Sequence | None:
        """End it now and free its blocks. None if it is not here (any more)."""
        sequence = self._sequences.get(sequence_id)
        if sequence is None:
            return None
        if not sequence.is_finished:
            sequence.finish(FinishReason.ABORT)
        self._remove(sequence)
        return sequence

    def schedule_ahead(self) -> ScheduleDecision | None:
        """The step after the one in flight: chunks of prompts that have begun, if they fill it.

        Else it is better to wait: prompts that come meanwhile can share the step, and those that
        begin like one in flight find its blocks.
        """
        first = self._waiting.peek()
        chunks: list[ScheduledChunk] = []
        budget = self._max_num_batched_tokens
        for sequence in self._running:
            if first is not None and order_key(first) < order_key(sequence):
                return None
            left = sequence.num_uncomputed_tokens - sequence.num_launched_tokens
            if sequence.is_loading:
                continue
            if left > 0:  # else its last chunk is in flight
                chunks.append(ScheduledChunk(sequence, min(budget, left)))
                budget -= chunks[-1].num_scheduled_tokens
            if budget == 0 or len(chunks) == self._max_num_seqs:
                return ScheduleDecision(tuple(chunks))
        return None

    def schedule(self) -> ScheduleDecision:
        """The chunks of the next step; none while everyone waits for blocks."""
        chunks: list[ScheduledChunk] = []
        budget = self._max_num_batched_tokens
        for sequence in self._in_turn():
            if sequence.is_loading:
                continue
            num_tokens = min(budget, sequence.num_uncomputed_tokens)
            chunks.append(ScheduledChunk(sequence, num_tokens))
            budget -= num_tokens
            if budget == 0 or len(chunks) == self._max_num_seqs:
                break
        self._load_ahead()
        return ScheduleDecision(tuple(chunks))

    def update(self, output: StepResult) -> list[Sequence]:
        """Let go of the sequences that have their first token or ended. Returns them."""
        sampled = set(output.sampled_sequences)
        leaving = [
            sequence for sequence in self._running if sequence.is_finished or sequence in sampled
        ]
        for sequence in leaving:
            if sequence.error is not None:
                self._block_manager.forget(sequence)
            self._remove(sequence)
        return leaving

    def _in_turn(self) -> Iterator[Sequence]:
        """Running and waiting sequences in order; a waiting one is admitted when reached."""
        running = deque(self._running)
        candidate = self._waiting.peek()
        while running or candidate is not None:
            if candidate is None or (running and order_key(running[0]) < order_key(candidate)):
                yield running.popleft()
            elif self._admit(candidate):
                yield candidate
                candidate = self._waiting.peek()
            else:
                candidate = None  # nobody overtakes it

    def _load_ahead(self) -> None:
        """Of prompts that did not get their turn, those next in line whose KV can be loaded while
        this step runs."""
        manager = self._block_manager
        while (sequence := self._waiting.peek()) is not None and manager.would_load(sequence):
            if not self._admit(sequence):
                return

    def _admit(self, sequence: Sequence) -> bool:
        if not self._block_manager.allocate(sequence, sequence.num_tokens):
            return False
        self._waiting.remove(sequence)
        sequence.status = SequenceStatus.RUNNING
        insort(self._running, sequence, key=order_key)
        return True

    def _remove(self, sequence: Sequence) -> None:
        del self._sequences[sequence.sequence_id]
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        else:
            self._running.remove(sequence)
        self._block_manager.free(sequence)
