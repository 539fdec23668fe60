"""Which sequences the next step advances.

Life of a sequence here
    1. `add`: with its KV in place (a hand-off), it takes part from the next `schedule` on. With
       some KV or none (a prompt computed here, a recompute), its tokens are prefilled first.
    2. Active: a decode step advances every active sequence by one token. Steps that prefill
       alternate with decode steps, so neither starves and neither has the other's shape.
    3. Out of blocks, the newest of the least urgent is preempted: it loses its blocks, keeps
       its tokens, and resumes before any sequence that has no blocks yet, from whatever the
       prefix cache and host memory still have. While its KV is copied there and back it waits:
       who needs its blocks waits a step, and nobody else is preempted for what is coming.
    4. `update` frees the finished ones.

While a decode step runs, `schedule_ahead` decides the next one: the same sequences, one token
further, without those that its token makes full, and those that have come with their KV in place.
Who must be prefilled, preempted or failed waits until the tokens are known.

Why this never deadlocks: of those with blocks, the first in order takes them from all others, so
it advances; if it waits for a place and no active one goes on, one of these yields its place. When
there is nobody left to take from, the rest is in transfer and comes back by itself, and a sequence
that needs more than the whole pool fails. Copies to and from host memory end by themselves.

Pure: no clock, no tensors.
"""

from __future__ import annotations

import sys
from bisect import insort
from typing import TYPE_CHECKING

from cluster.errors import ContextLengthExceeded, InvalidRequest
from cluster.request import FinishReason
from engine.schedule import ScheduledChunk, ScheduleDecision, check_fits
from engine.sequence import SequenceStatus
from engine.stopping import is_full
from engine.waiting_queue import WaitingQueue, order_key

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.block_manager import BlockManager
    from engine.schedule import StepResult
    from engine.sequence import Sequence

Place = tuple[int, int]  # in the line for blocks, as `order_key`
_MAX_HEADROOM_SHARE = 8  # at most 1/8 of the pool is kept for active sequences to grow


class DecodeScheduler:
    """Decode in full, prefill in between. Owns the sequences from `add` to `update` or
    `abort`, and reports those that failed in the decision."""

    def __init__(
        self,
        block_manager: BlockManager,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        *,
        max_model_len: int = sys.maxsize,
        first_handoff: Callable[[], Place | None] = lambda: None,
    ) -> None:
        """`first_handoff`: the place of the first hand-off that waits for blocks."""
        if max_num_batched_tokens < 1 or max_num_seqs < 1:
            raise ValueError("max_num_batched_tokens and max_num_seqs must be positive.")
        self._block_manager = block_manager
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_num_seqs = min(max_num_seqs, max_num_batched_tokens)
        self._max_model_len = max_model_len
        self._first_handoff = first_handoff
        self._sequences: dict[str, Sequence] = {}
        self._active: list[Sequence] = []  # by order_key
        self._rows: dict[Sequence, ScheduledChunk] = {}  # of the active: one decode step each
        self._ready = WaitingQueue()  # have blocks, wait for a place among the active
        self._preempted = WaitingQueue()
        self._waiting = WaitingQueue()
        self._num_arrivals = 0
        self._is_prefill_turn = False
        self._newly_preempted: list[Sequence] = []
        self._newly_failed: list[Sequence] = []

    @property
    def num_running(self) -> int:
        return len(self._active)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._ready) + len(self._preempted)

    @property
    def num_preempted(self) -> int:
        """While it is not 0, blocks given to newcomers are taken from these."""
        return len(self._preempted)

    def place_for(self, handoff: Sequence) -> Place:
        """That of a hand-off that comes now: behind all that have come and are not less urgent."""
        return handoff.request.priority, self._num_arrivals

    def lacks_blocks(self, place: Place) -> bool:
        """Whether one before this place has no blocks yet, though there is a place among the active
        for it: blocks given to newcomers are taken from it."""
        first = self._waiting.peek()
        return first is not None and order_key(first) < place and self._has_place()

    @property
    def queued_tokens(self) -> int:
        """Tokens to be computed before the sequences they belong to can decode."""
        return sum(sequence.num_uncomputed_tokens - 1 for sequence in self._sequences.values())

    def has_work(self) -> bool:
        return bool(self._sequences or self._newly_failed)

    def get(self, sequence_id: str) -> Sequence | None:
        return self._sequences.get(sequence_id)

    def sequences(self) -> tuple[Sequence, ...]:
        return tuple(self._sequences.values())

    def add(self, sequence: Sequence) -> None:
        """Take a sequence, with its blocks if it has some. Raises what can never run here; its
        blocks are then still the caller's."""
        if sequence.sequence_id in self._sequences:
            raise InvalidRequest("A sequence with this id is running.", param="sequence_id")
        check_fits(sequence, self._block_manager)
        sequence.arrival = self._num_arrivals
        self._num_arrivals += 1
        sequence.status = SequenceStatus.WAITING
        self._sequences[sequence.sequence_id] = sequence
        (self._ready if sequence.block_table else self._waiting).push(sequence)

    def abort(self, sequence_id: str) -> Sequence | None:
        """End it now and free its blocks. None if it is not here (any more)."""
        sequence = self._sequences.get(sequence_id)
        if sequence is None:
            return None
        if not sequence.is_finished:
            sequence.finish(FinishReason.ABORT)
        self._remove(sequence)
        return sequence

    def schedule(self) -> ScheduleDecision:
        """One decode step or one prefill step; no chunks while everyone waits for blocks."""
        self._activate()
        chunks = self._next_chunks()
        while not chunks and self._yield_place():
            chunks = self._next_chunks()
        preempted, failed = tuple(self._newly_preempted), tuple(self._newly_failed)
        self._newly_preempted, self._newly_failed = [], []
        return ScheduleDecision(tuple(chunks), preempted, failed)

    def schedule_ahead(self) -> ScheduleDecision | None:
        """The decode step after the one in flight. None if somebody would have to be prefilled,
        preempted or failed, or if nobody goes on."""
        self._activate()
        if self._newly_failed:
            return None
        chunks = []
        block_size = self._block_manager.block_size
        for sequence in self._active:
            if sequence.is_loading:
                continue
            num_drawn = sequence.num_launched_draws
            num_tokens = len(sequence.token_ids) + num_drawn
            if num_drawn and is_full(sequence, num_tokens, self._max_model_len):
                continue
            num_computed = sequence.num_computed_tokens + sequence.num_launched_tokens
            if num_tokens - num_computed != 1:
                return None
            has_room = num_tokens <= len(sequence.block_table) * block_size
            if not has_room and not self._block_manager.allocate(sequence, num_tokens):
                return None
            chunks.append(self._rows[sequence])
        if not chunks:
            return None
        self._is_prefill_turn = True
        return ScheduleDecision(tuple(chunks), decodes=True)

    def update(self, output: StepResult) -> list[Sequence]:
        """Free the sequences that the step finished. Returns them."""
        finished = list(output.finished_sequences)
        for sequence in finished:
            if sequence.error is not None:
                self._block_manager.forget(sequence)
            self._remove(sequence)
        return finished

    # ---- who is active ------------------------------------------------------------------

    def _activate(self) -> None:
        """Fill free places: preempted sequences first, then, in order, those that have their blocks
        and, if no preempted one waits, new ones as long as there are blocks for them."""
        self._admit_from(self._preempted)
        takes_new = not self._preempted
        while self._has_place() and (ready := self._ready.peek()) is not None:
            new = self._waiting.peek()
            if takes_new and new is not None and order_key(new) < order_key(ready):
                takes_new = self._admit(self._waiting, new)
            else:
                self._make_active(self._ready, ready)
        if takes_new:
            self._admit_from(self._waiting)

    def _admit_from(self, queue: WaitingQueue) -> None:
        """In order; none overtakes one that does not fit yet."""
        while self._has_place() and (sequence := queue.peek()) is not None:
            if not self._admit(queue, sequence):
                return

    def _admit(self, queue: WaitingQueue, sequence: Sequence) -> bool:
        """False if it must wait for blocks. Those admitted leave one for each active sequence to
        grow into, or they would be preempted again at once. One that can never fit fails. New ones
        do not overtake hand-offs: who needs few blocks would take all that one with many waits for.
        """
        if not self._can_ever_fit(sequence):
            self._fail(sequence)
            return True
        if queue is self._waiting and self._is_behind_handoff(sequence):
            return False
        share = self._block_manager.num_blocks // _MAX_HEADROOM_SHARE
        headroom = min(len(self._active), share)
        if not self._block_manager.allocate(sequence, sequence.num_tokens, headroom=headroom):
            return False
        self._make_active(queue, sequence)
        return True

    def _is_behind_handoff(self, sequence: Sequence) -> bool:
        place = self._first_handoff()
        return place is not None and place <= order_key(sequence)

    def _make_active(self, queue: WaitingQueue, sequence: Sequence) -> None:
        queue.remove(sequence)
        sequence.status = SequenceStatus.RUNNING
        insort(self._active, sequence, key=order_key)
        self._rows[sequence] = ScheduledChunk(sequence, 1)

    def _has_place(self) -> bool:
        return len(self._active) < self._max_num_seqs

    def _yield_place(self) -> bool:
        """When no active sequence can go on, the last gives its place to one before it in order
        that has blocks too. It keeps its own, until that one needs them."""
        first = self._ready.peek()
        if first is None or not self._active or order_key(self._active[-1]) < order_key(first):
            return False
        last = self._active[-1]
        self._detach(last)
        last.status = SequenceStatus.WAITING
        self._make_active(self._ready, first)
        self._ready.push(last)
        return True

    # ---- what they do -------------------------------------------------------------------

    def _next_chunks(self) -> list[ScheduledChunk]:
        """Of a step that decodes or one that prefills, in turn; of the other if there are none."""
        decode, prefill = self._decode_chunks, self._prefill_chunks
        for phase in (prefill, decode) if self._is_prefill_turn else (decode, prefill):
            chunks = phase()
            if chunks:
                self._is_prefill_turn = phase == decode
                return chunks
        return []

    def _decode_chunks(self) -> list[ScheduledChunk]:
        """The last token of every active sequence that has computed all before it.

        Runs between any two steps of the device, so it calls nothing for a sequence whose
        blocks still have room.
        """
        chunks = []
        block_size = self._block_manager.block_size
        for sequence in tuple(self._active):
            num_tokens = len(sequence.token_ids)
            if num_tokens - sequence.num_computed_tokens != 1:
                continue
            if sequence.status is not SequenceStatus.RUNNING:
                continue  # one before it has just taken its blocks
            if sequence.is_loading:
                continue
            if num_tokens <= len(sequence.block_table) * block_size or self._grow(sequence):
                chunks.append(self._rows[sequence])
        return chunks

    def _prefill_chunks(self) -> list[ScheduledChunk]:
        """As many tokens as a step takes of the active sequences that lack more than one."""
        chunks: list[ScheduledChunk] = []
        budget = self._max_num_batched_tokens
        for sequence in tuple(self._active):
            if budget == 0:
                break
            if sequence.status is not SequenceStatus.RUNNING or sequence.is_loading:
                continue
            if sequence.num_uncomputed_tokens > 1 and self._grow(sequence):
                num_tokens = min(budget, sequence.num_uncomputed_tokens)
                chunks.append(ScheduledChunk(sequence, num_tokens))
                budget -= num_tokens
        return chunks

    def _grow(self, sequence: Sequence) -> bool:
        """Blocks for all its tokens, taken from those after it in order if need be. If that is
        not enough it keeps what it has and waits a step: others finish, transfers end."""
        while not self._block_manager.allocate(sequence, sequence.num_tokens):
            if not self._can_ever_fit(sequence):
                self._fail(sequence)
                return False
            if self._is_room_coming(sequence) or not self._preempt_after(sequence):
                return False
        return True

    def _is_room_coming(self, sequence: Sequence) -> bool:
        """Whether copies that run now free what it lacks."""
        manager = self._block_manager
        num_lacking = manager.num_blocks_for(sequence.num_tokens) - len(sequence.block_table)
        num_coming = manager.num_coming_blocks
        return num_coming > 0 and manager.num_free_blocks + num_coming >= num_lacking

    def _can_ever_fit(self, sequence: Sequence) -> bool:
        needed = self._block_manager.num_blocks_for(sequence.num_tokens)
        return needed <= self._block_manager.num_blocks

    def _preempt_after(self, sequence: Sequence) -> bool:
        """Preempt the last sequence in order, unless that is `sequence`."""
        victim = max((*self._active[-1:], *self._ready), key=order_key)
        if order_key(victim) <= order_key(sequence):
            return False
        self._detach(victim)
        self._block_manager.preempt(victim)
        victim.status = SequenceStatus.PREEMPTED
        victim.num_preemptions += 1
        self._preempted.push(victim)
        self._newly_preempted.append(victim)
        return True

    # ---- how they leave -----------------------------------------------------------------

    def _fail(self, sequence: Sequence) -> None:
        sequence.fail(
            ContextLengthExceeded("The sequence has outgrown this node's whole KV cache.")
        )
        self._remove(sequence)
        self._newly_failed.append(sequence)

    def _remove(self, sequence: Sequence) -> None:
        del self._sequences[sequence.sequence_id]
        self._detach(sequence)
        self._block_manager.free(sequence)

    def _detach(self, sequence: Sequence) -> None:
        for queue in (self._waiting, self._ready, self._preempted):
            if sequence in queue:
                queue.remove(sequence)
                return
        self._active.remove(sequence)
        del self._rows[sequence]
