"""Blocks promised to hand-offs, and the queue for them. Lives on the engine's thread.

Life of a reservation
    WAITING   asked for, but the pool has no room now; first come, first served
    RESERVED  blocks are set aside; the transfer may write into them
    STARTED   the sequence took them over and runs
    GONE      cancelled, in any state before STARTED; the blocks are free again

Room is kept for what runs: one block for each running sequence stays free, so that a new
hand-off does not make the next step preempt.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.errors import Cancelled, ContextLengthExceeded, TransferFailed
from cluster.prefix_hash import BlockHash, hash_blocks

if TYPE_CHECKING:
    from cluster.request import SequenceRequest
    from engine.block_manager import BlockManager, Reservation


@dataclass(frozen=True, slots=True)
class ReservedBlocks:
    """All block ids of a prompt, by position; the first `num_held_blocks` need no transfer."""

    block_ids: tuple[int, ...]
    num_held_blocks: int


@dataclass(slots=True)
class _Waiting:
    request: SequenceRequest
    block_hashes: list[BlockHash]
    future: Future[ReservedBlocks]


@dataclass(slots=True)
class _Reserved:
    request: SequenceRequest
    block_hashes: list[BlockHash]
    reservation: Reservation


class Reservations:
    def __init__(
        self,
        block_manager: BlockManager,
        *,
        num_running: Callable[[], int],
        root_of: Callable[[bytes], BlockHash],
    ) -> None:
        self._block_manager = block_manager
        self._num_running = num_running
        self._root_of = root_of
        self._waiting: OrderedDict[str, _Waiting] = OrderedDict()
        self._reserved: dict[str, _Reserved] = {}

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_reserved(self) -> int:
        return len(self._reserved)

    @property
    def queued_tokens(self) -> int:
        return sum(len(waiting.request.prompt_token_ids) for waiting in self._waiting.values())

    def ask(self, request: SequenceRequest) -> Future[ReservedBlocks]:
        """Blocks for the prompt, now or once there is room. Raises when it can never fit."""
        size = self._block_manager.block_size
        needed = -(-(len(request.prompt_token_ids) + 1) // size)
        if needed > self._block_manager.num_blocks:
            raise ContextLengthExceeded(
                f"The prompt needs {needed} KV blocks; the decode node has "
                f"{self._block_manager.num_blocks}."
            )
        hashes = hash_blocks(request.prompt_token_ids, size, self._root_of(request.cache_salt))
        waiting = _Waiting(request, hashes, Future())
        self._waiting[request.sequence_id] = waiting
        self.retry()
        return waiting.future

    def retry(self) -> None:
        """Serve the queue, in order, as far as the free blocks go."""
        while self._waiting:
            sequence_id, waiting = next(iter(self._waiting.items()))
            if waiting.future.cancelled():
                del self._waiting[sequence_id]
                continue
            if not self._reserve(sequence_id, waiting):
                return
            del self._waiting[sequence_id]

    def take(self, sequence_id: str) -> tuple[SequenceRequest, list[BlockHash], Reservation]:
        """Hand a reservation over to a sequence that starts. Raises when it is gone."""
        reserved = self._reserved.pop(sequence_id, None)
        if reserved is None:
            raise TransferFailed("The reservation is gone.", reason="reservation_gone")
        return reserved.request, reserved.block_hashes, reserved.reservation

    def cancel(self, sequence_id: str) -> None:
        """Give the blocks, or the place in the queue, back. Idempotent."""
        waiting = self._waiting.pop(sequence_id, None)
        if waiting is not None and not waiting.future.done():
            waiting.future.set_exception(Cancelled("The reservation was cancelled."))
        reserved = self._reserved.pop(sequence_id, None)
        if reserved is not None:
            reserved.reservation.cancel()
            self.retry()

    def _reserve(self, sequence_id: str, waiting: _Waiting) -> bool:
        manager = self._block_manager
        num_tokens = len(waiting.request.prompt_token_ids)
        needed = -(-(num_tokens + 1) // manager.block_size)
        spare = manager.num_free_blocks - self._num_running()
        if needed > spare and self._num_running():
            return False
        reservation = manager.reserve(waiting.block_hashes, num_tokens)
        if reservation is None:
            return False
        self._reserved[sequence_id] = _Reserved(waiting.request, waiting.block_hashes, reservation)
        waiting.future.set_result(
            ReservedBlocks(tuple(reservation.block_ids), reservation.num_held_blocks)
        )
        return True
