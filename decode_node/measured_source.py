"""Blocks for hand-offs that are only measured, in front of those for hand-offs that matter.

Life of a measured hand-off, as the receiver's source of blocks sees it
    1. `expect`: its sequence is known by name, before anybody sends it.
    2. `reserve`: blocks that hold nothing, for what the sender has. It is on the clock.
    3. `start`: all of it has arrived and is verified. The clock stops, the blocks are free again:
       nothing runs on them, and nothing of them is cached.
    4. A failure is told to who waits; blocks that may still be written to stay with the transfer
       until it has ended (`release`).

Every other sequence is its node's, as if this were not here. All methods run on the event loop.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.errors import Cancelled, NodeUnavailable, ServingError, TransferFailed
from engine.loop_errors import unawaited
from node_parts.spare_blocks import reserve_spare

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from cluster.clock import Clock
    from cluster.request import SequenceRequest
    from engine.block_manager import BlockManager
    from engine.loop import EngineLoop
    from engine.reservation import Reservation
    from kv_transfer.receiving.block_source import BlockSource, ReservedBlocks


@dataclass(slots=True)
class Measured:
    """One hand-off on the clock. `done` gives the seconds from its ticket to its last byte."""

    max_blocks: int
    done: asyncio.Future[float]
    num_blocks: int = 0
    reserved_at: float = 0.0

    @property
    def has_ended(self) -> bool:
        """Well or not. Who waited for it may have given up instead."""
        return self.done.done() and not self.done.cancelled()


class MeasuredSource:
    """A `BlockSource`. `others`: the node's own."""

    def __init__(
        self, block_manager: BlockManager, others: BlockSource, loop: EngineLoop, clock: Clock
    ) -> None:
        self._block_manager = block_manager
        self._others = others
        self._clock = clock
        self._measured: dict[str, Measured] = {}
        self._reservations: dict[str, Reservation] = {}
        self._loop = loop

    def expect(self, sequence_id: str, max_blocks: int) -> Measured:
        done: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        measured = self._measured[sequence_id] = Measured(max_blocks, done)
        return measured

    def forget(self, sequence_id: str) -> None:
        """Nobody waits for it any more; its blocks follow when nothing writes to them."""
        measured = self._measured.pop(sequence_id)
        if measured.has_ended:
            measured.done.exception()  # looked at
        else:
            measured.done.cancel()

    async def num_spare_blocks(self) -> int:
        """How many blocks hold nothing that anybody could want."""
        manager = self._block_manager
        return await asyncio.wrap_future(self._loop.call(lambda: manager.num_ready_blocks))

    # ---- the receiver's source of blocks ----------------------------------------------------

    async def reserve(self, request: SequenceRequest, gateway_id: str) -> ReservedBlocks:
        measured = self._measured.get(request.sequence_id)
        if measured is None:
            return await self._others.reserve(request, gateway_id)
        num_blocks, left = divmod(len(request.prompt_token_ids), self._block_manager.block_size)
        if left or not 0 < num_blocks <= measured.max_blocks:
            raise TransferFailed("This is not what was to be measured.", reason="unknown")
        reservation = await reserve_spare(
            self._loop,
            self._block_manager,
            request.sequence_id,
            lambda num_spare: num_blocks if num_blocks <= num_spare else 0,
        )
        self._reservations[request.sequence_id] = reservation
        measured.num_blocks = num_blocks
        measured.reserved_at = self._clock()
        return reservation

    def start(self, sequence_id: str, first_token_id: int) -> Awaitable[None]:
        if sequence_id not in self._reservations:
            return self._others.start(sequence_id, first_token_id)
        self._has_come(sequence_id)
        return asyncio.sleep(0)  # nothing runs

    def _has_come(self, sequence_id: str) -> None:
        measured = self._measured.get(sequence_id)
        if measured is None:
            raise Cancelled("Nobody waits for this measurement.")
        seconds = self._clock() - measured.reserved_at
        self.release(sequence_id)
        if not measured.done.done():
            measured.done.set_result(seconds)

    def release(self, sequence_id: str) -> None:
        reservation = self._reservations.pop(sequence_id, None)
        if reservation is not None:
            unawaited(self._loop.call(reservation.cancel))
        else:
            self._others.release(sequence_id)

    def may_recompute(self, sequence_id: str, num_good_blocks: int) -> bool:
        if sequence_id in self._measured or sequence_id in self._reservations:
            return False
        return self._others.may_recompute(sequence_id, num_good_blocks)

    def recompute(self, sequence_id: str, num_good_blocks: int) -> None:
        self._others.recompute(sequence_id, num_good_blocks)

    def on_transfer_failed(self, sequence_id: str, error: ServingError) -> None:
        measured = self._measured.get(sequence_id)
        if measured is None:
            self._others.on_transfer_failed(sequence_id, error)
        elif not measured.done.done():
            measured.done.set_exception(error)

    def on_transfer_withdrawn(self, sequence_id: str) -> None:
        if sequence_id in self._measured:
            self.on_transfer_failed(sequence_id, NodeUnavailable("The sender withdrew it."))
        else:
            self._others.on_transfer_withdrawn(sequence_id)
