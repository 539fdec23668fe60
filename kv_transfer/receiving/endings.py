"""How an incoming transfer ends: quarantine first, free when nothing can write, then a tombstone.

Life of an ending
    1. `abort`: nothing more lands, the node and the peer hear of it.
    2. `settle`, whenever something that may write has ended: `Free` once nothing can any more.
    3. `finish`: it is over, and remembered; a newer attempt of its sequence may ask for blocks.

A part of the intake, and as pure: instructions go out, time is an argument.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kv_transfer.receiving.intake_instructions import (
    AskBlocks,
    Free,
    Instruction,
    ReportFailed,
    ReportWithdrawn,
    SendAbort,
    SendRefused,
    StopAsking,
)
from kv_transfer.transfer import TransferState

if TYPE_CHECKING:
    from cluster.errors import ServingError
    from kv_transfer.lease import LeaseTable
    from kv_transfer.receiving.incoming import IncomingTransfer
    from kv_transfer.receiving.incoming_transfers import IncomingTransfers

TOMBSTONE_LEASES = 2
# How long a transfer whose sender a gateway has lost may stand still, and then drain: a sender that
# lives answers in a fraction of it.
DOUBT_SECONDS = 0.5


class Endings:
    """Of all transfers of one intake."""

    def __init__(
        self, transfers: IncomingTransfers, leases: LeaseTable, *, drain_seconds: float
    ) -> None:
        self._transfers = transfers
        self._leases = leases
        self._drain_seconds = drain_seconds

    def abort(
        self,
        transfer: IncomingTransfer,
        error: ServingError,
        now: float,
        *,
        report: ReportWithdrawn | None = None,
        tells_peer: bool = True,
    ) -> list[Instruction]:
        """Quarantine it. Nothing when it is over, ending, or on the way to the engine."""
        state = transfer.state
        if state.is_final or state is TransferState.QUARANTINED or transfer.is_starting:
            return []
        transfer.state = TransferState.QUARANTINED
        transfer.error = error
        self._leases.release(transfer.transfer_id)
        transfer.num_good_blocks = None if report else transfer.num_good_blocks_after(error)
        instructions: list[Instruction] = [
            report or ReportFailed(transfer.sequence, error, transfer.num_good_blocks)
        ]
        if state is TransferState.PENDING:
            transfer.num_to_drain = 0  # no ticket, no frames
            if transfer.is_asking:
                instructions.append(StopAsking(transfer.transfer_id))
            if tells_peer:
                refused = SendRefused(transfer.session_id, transfer.transfer_id, error)
                instructions.append(refused)
        else:
            transfer.drain_deadline = now + self._drain_seconds
            self.hurry(transfer, now)
            if tells_peer:
                ids = (transfer.session_id, transfer.transfer_id)
                instructions.append(SendAbort(*ids, transfer.abort_epoch, error))
        return instructions + self.settle(transfer, now)

    def hurry(self, transfer: IncomingTransfer, now: float) -> None:
        """A sender that is doubted gets less time to say that it has stopped."""
        if transfer.is_doubted and transfer.drain_deadline is not None:
            transfer.drain_deadline = min(transfer.drain_deadline, now + DOUBT_SECONDS)

    def settle(self, transfer: IncomingTransfer, now: float) -> list[Instruction]:
        """Free a quarantined transfer once nothing can write into its blocks."""
        if transfer.state is not TransferState.QUARANTINED:
            return []
        if not transfer.is_quiescent:
            return []
        num_good_blocks = transfer.num_good_blocks or 0
        freed = [Free(transfer.sequence, num_good_blocks)] if transfer.block_ids else []
        return [*freed, *self.finish(transfer, TransferState.FAILED, now)]

    def finish(
        self, transfer: IncomingTransfer, state: TransferState, now: float
    ) -> list[Instruction]:
        """It is over; a newer attempt of its sequence may ask for blocks now."""
        transfer.state = state
        tombstone_seconds = TOMBSTONE_LEASES * self._leases.duration_seconds
        self._transfers.end(transfer, forget_at=now + tombstone_seconds)
        self._leases.release(transfer.transfer_id)
        instructions: list[Instruction] = []
        for newer in self._transfers.waiting_for(transfer.transfer_id):
            newer.is_waiting_for.discard(transfer.transfer_id)
            instructions += self.ask_if_first(newer)
        return instructions

    def ask_if_first(self, transfer: IncomingTransfer) -> list[Instruction]:
        if transfer.state is not TransferState.PENDING or transfer.is_waiting_for:
            return []
        transfer.is_asking = True
        return [AskBlocks(transfer.sequence)]
