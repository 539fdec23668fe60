"""The blocks of prefixes that are on their way here: a prefill node's receiver asks for them.

Life of an incoming prefix
    1. `expect`: a holder is about to be asked for it, under a name that was drawn for it.
    2. `reserve`: its hand-off asks for blocks, for whole blocks of the prompt's beginning and
       nothing else. What we have already is not sent.
    3. `start`: all of it has arrived and is verified. The prefix cache gets the blocks.
       Or it failed, and `done` says why; or nobody waits any more (`forget`). Then blocks that may
       still be written to stay with the transfer until `release`.

All methods run on the event loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.clock import Clock, monotonic
from cluster.errors import Cancelled, NodeUnavailable, Overloaded, ServingError, TransferFailed
from engine.loop_errors import unawaited
from node_parts.reserving import reserved

if TYPE_CHECKING:
    import asyncio

    from cluster.request import SequenceRequest
    from engine.block_manager import BlockManager
    from engine.loop import EngineLoop
    from engine.reservation import Reservation
    from engine.sequence import Sequence


@dataclass(slots=True)
class IncomingPrefix:
    """The first `num_blocks` blocks of a sequence's prompt, or fewer. `done`: it has arrived."""

    sequence: Sequence
    num_blocks: int
    done: asyncio.Future[None]
    num_tokens_moved: int = 0
    reserved_at: float = 0.0
    seconds: float = 0.0  # from the reservation to the last byte: what the way took, not the steps

    def check(self, request: SequenceRequest) -> int:
        """The number of blocks that this hand-off brings. Raises for any but what was asked."""
        sequence, size = self.sequence, self.sequence.block_size
        num_blocks, left = divmod(len(request.prompt_token_ids), size)
        if (
            left
            or num_blocks > self.num_blocks
            or request.cache_salt != sequence.request.cache_salt
            or request.prompt_token_ids != sequence.prompt_token_ids[: num_blocks * size]
        ):
            raise TransferFailed("This is not the prefix that was asked for.", reason="unknown")
        return num_blocks


class IncomingPrefixes:
    """The `BlockSource` of a prefill node's receiver."""

    def __init__(self, block_manager: BlockManager, clock: Clock = monotonic) -> None:
        self._block_manager = block_manager
        self._clock = clock
        self._prefixes: dict[str, IncomingPrefix] = {}
        self._reservations: dict[str, Reservation] = {}  # maybe of prefixes nobody waits for
        self._loop: EngineLoop

    def bind(self, loop: EngineLoop) -> None:
        self._loop = loop

    def __len__(self) -> int:
        return len(self._prefixes)

    def expect(self, name: str, prefix: IncomingPrefix) -> None:
        self._prefixes[name] = prefix

    def forget(self, name: str) -> None:
        """Nobody waits for it any more."""
        del self._prefixes[name]

    # ---- what the receiver asks and says --------------------------------------------------

    async def reserve(self, request: SequenceRequest, gateway_id: str) -> Reservation:
        prefix = self._prefixes.get(request.sequence_id)
        if prefix is None:
            raise Cancelled("Nobody waits for this prefix.")
        num_blocks = prefix.check(request)
        sequence, size = prefix.sequence, prefix.sequence.block_size
        hashes = sequence.block_hashes[:num_blocks]
        owner = f"fetch for {sequence.sequence_id}"
        reservation = await reserved(
            self._loop, lambda: self._block_manager.reserve(hashes, num_blocks * size, owner)
        )
        if reservation is None:
            raise Overloaded("There are no blocks for a prefix.")
        self._reservations[request.sequence_id] = reservation
        prefix.num_tokens_moved = (num_blocks - reservation.num_held_blocks) * size
        prefix.reserved_at = self._clock()
        return reservation

    async def start(self, sequence_id: str, first_token_id: int) -> None:
        reservation = self._reservations.get(sequence_id)
        prefix = self._prefixes.get(sequence_id)
        if reservation is None or prefix is None:
            raise Cancelled("Nobody waits for this prefix.")
        prefix.seconds = self._clock() - prefix.reserved_at
        hashes = prefix.sequence.block_hashes[: len(reservation.block_ids)]
        del self._reservations[sequence_id]
        # Not waited for, which would be for the step that runs: the prompt is queued behind it.
        unawaited(self._loop.call(lambda: reservation.keep(hashes)))
        if not prefix.done.done():
            prefix.done.set_result(None)

    def release(self, sequence_id: str) -> None:
        reservation = self._reservations.pop(sequence_id, None)
        if reservation is not None:
            unawaited(self._loop.call(reservation.cancel))

    def may_recompute(self, sequence_id: str, num_good_blocks: int) -> bool:
        return False

    def recompute(self, sequence_id: str, num_good_blocks: int) -> None:
        self.release(sequence_id)

    def on_transfer_failed(self, sequence_id: str, error: ServingError) -> None:
        prefix = self._prefixes.get(sequence_id)
        if prefix is not None and not prefix.done.done():
            prefix.done.set_exception(error)

    def on_transfer_withdrawn(self, sequence_id: str) -> None:
        self.on_transfer_failed(sequence_id, NodeUnavailable("The holder withdrew its prefix."))
