"""Blocks promised to hand-offs, and the queue for them. Lives on the engine's thread.

Life of a reservation
    WAITING   asked for, but the pool has no room now; by priority, then first come, first served
    RESERVED  blocks are set aside; the transfer may write into them
    STARTED   the sequence took them over and runs
    GONE      cancelled, in any state before STARTED; the blocks are free again

Room is kept for what runs: one block for each running sequence stays free, so that a new
hand-off does not make the next step preempt. Who was preempted comes first: as long as one
waits for its blocks, nobody else gets any. Prompts that are computed here from their beginning
stand in one line with hand-offs: of either kind, those that never cease would take every block that
comes back.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from cluster.errors import Cancelled, ContextLengthExceeded, TransferFailed
from engine.sequence import Sequence, SequenceStatus
from kv_transfer.trace import TRACE

if TYPE_CHECKING:
    from decode_node.scheduler import Place
    from engine.block_manager import BlockManager
    from engine.reservation import Reservation


@dataclass(frozen=True, slots=True)
class ReservedBlocks:
    """All block ids of a prompt, by position; the first `num_held_blocks` need no transfer."""

    block_ids: tuple[int, ...]
    num_held_blocks: int


@dataclass(slots=True)
class _Waiting:
    sequence: Sequence
    future: Future[ReservedBlocks]
    place: Place  # in the line for blocks


@dataclass(slots=True)
class _Reserved:
    sequence: Sequence
    reservation: Reservation


class Running(Protocol):
    """What is needed to know of the others: a `DecodeScheduler`."""

    @property
    def num_running(self) -> int: ...
    @property
    def num_preempted(self) -> int: ...
    def place_for(self, handoff: Sequence) -> Place: ...
    def lacks_blocks(self, place: Place) -> bool: ...


class Reservations:
    def __init__(self, block_manager: BlockManager, running: Running) -> None:
        self._block_manager = block_manager
        self._running = running
        self._waiting: dict[str, _Waiting] = {}  # in the order in which they are served
        self._reserved: dict[str, _Reserved] = {}
        self._started: list[Sequence] = []  # since the last step was decided on
        self._stepping: list[Sequence] = []  # in their first step

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def first_place(self) -> Place | None:
        """That of the first who waits."""
        return next((waiting.place for waiting in self._waiting.values()), None)

    @property
    def num_reserved(self) -> int:
        return len(self._reserved)

    @property
    def queued_tokens(self) -> int:
        return sum(waiting.sequence.num_tokens for waiting in self._waiting.values())

    def ask(self, sequence: Sequence) -> Future[ReservedBlocks]:
        """Blocks for the prompt, now or once there is room. Raises when it can never fit."""
        needed = self._num_blocks_for(sequence)
        if needed > self._block_manager.num_blocks:
            raise ContextLengthExceeded(
                f"The prompt needs {needed} KV blocks; the decode node has "
                f"{self._block_manager.num_blocks}."
            )
        sequence.status = SequenceStatus.WAITING_FOR_KV
        waiting = _Waiting(sequence, Future(), self._running.place_for(sequence))
        # Running: from here only this thread ends it, so nobody cancels it between two looks.
        waiting.future.set_running_or_notify_cancel()
        self._enqueue(waiting)
        self.retry()
        return waiting.future

    def retry(self) -> None:
        """Serve the queue, in order, as far as the free blocks go."""
        while self._waiting:
            sequence_id, waiting = next(iter(self._waiting.items()))
            if not self._reserve(sequence_id, waiting):
                return
            del self._waiting[sequence_id]

    def start(self, sequence_id: str, first_token_id: int) -> Sequence:
        """The sequence, owning its blocks, its prompt's KV in place. Raises when it is gone."""
        if TRACE.is_on:
            TRACE.mark("d.engine")
        reserved = self._reserved.pop(sequence_id, None)
        if reserved is None:
            raise TransferFailed("The reservation is gone.", reason="reservation_gone")
        sequence = reserved.sequence
        sequence.append_token(first_token_id)
        reserved.reservation.attach(sequence, is_hit_at_once=False)
        self._started.append(sequence)
        return sequence

    def before_step(self) -> None:
        """Enter prompts into the prefix cache while their first step runs, which must not wait for
        that. Those whose step is followed by none are entered at its end."""
        for sequence in self._stepping:
            self._block_manager.mark_computed(sequence)
        self._stepping, self._started = self._started, []

    def start_partly(self, sequence_id: str, num_good_blocks: int) -> Sequence | None:
        """The sequence with its blocks, of which the first `num_good_blocks` hold the KV of its
        prompt: the rest is to be computed here. Without any if its whole prompt was cached: its
        last token is computed all the same, and not in a block that others read. None when it is
        gone."""
        reserved = self._reserved.pop(sequence_id, None)
        if reserved is None:
            return None
        sequence, reservation = reserved.sequence, reserved.reservation
        block_size = self._block_manager.block_size
        if reservation.num_held_blocks * block_size == sequence.num_tokens:
            reservation.cancel()
            return sequence
        num_tokens = num_good_blocks * block_size
        reservation.attach(sequence, num_computed_tokens=min(num_tokens, sequence.num_tokens - 1))
        return sequence

    def cancel(self, sequence_id: str) -> None:
        """Give the blocks, or the place in the queue, back. Idempotent."""
        waiting = self._waiting.pop(sequence_id, None)
        if waiting is not None and not waiting.future.done():
            waiting.future.set_exception(Cancelled("The reservation was cancelled."))
        reserved = self._reserved.pop(sequence_id, None)
        if reserved is not None:
            reserved.reservation.cancel()
        if waiting is not None or reserved is not None:
            self.retry()  # of a long one that waited, those behind it may fit where it did not

    def _enqueue(self, waiting: _Waiting) -> None:
        """Of those with the same place who asked first is first. Sorted here, since every step
        looks for the first."""
        last = next(reversed(self._waiting.values()), None)
        self._waiting[waiting.sequence.sequence_id] = waiting
        if last is not None and waiting.place < last.place:
            in_order = sorted(self._waiting.items(), key=lambda item: item[1].place)
            self._waiting = dict(in_order)

    def _reserve(self, sequence_id: str, waiting: _Waiting) -> bool:
        sequence, manager = waiting.sequence, self._block_manager
        running = self._running
        if running.num_preempted or running.lacks_blocks(waiting.place):
            return False
        num_running = running.num_running
        spare = manager.num_free_blocks - num_running
        if num_running and self._num_blocks_for(sequence) > spare:
            return False
        reservation = manager.reserve(
            sequence.block_hashes, sequence.num_tokens, owner=f"hand-off of {sequence_id}"
        )
        if reservation is None:
            return False
        self._reserved[sequence_id] = _Reserved(sequence, reservation)
        waiting.future.set_result(
            ReservedBlocks(tuple(reservation.block_ids), reservation.num_held_blocks)
        )
        return True

    def _num_blocks_for(self, sequence: Sequence) -> int:
        """For the prompt and the first token that decode will add."""
        return -(-(sequence.num_tokens + 1) // self._block_manager.block_size)
