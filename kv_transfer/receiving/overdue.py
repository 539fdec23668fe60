"""Why time alone has ended an incoming transfer. A part of the intake, and as pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kv_transfer.failures import FailureReason
from kv_transfer.receiving.endings import DOUBT_SECONDS
from kv_transfer.transfer import TransferState, stall_limit

if TYPE_CHECKING:
    from kv_transfer.lease import LeaseTable
    from kv_transfer.receiving.incoming import IncomingTransfer


class Overdue:
    """Asked by the timer, and at every frame and commit too: a node that was stopped may find those
    before its timer runs. `stall_seconds`: the most that what was announced may not come."""

    def __init__(self, leases: LeaseTable, *, stall_seconds: float) -> None:
        self._leases = leases
        self._stall_seconds = stall_seconds

    def why(self, transfer: IncomingTransfer, now: float) -> FailureReason | None:
        if not (transfer.is_receiving or transfer.state is TransferState.PENDING):
            return None
        if not self._leases.is_live(transfer.transfer_id, now):
            return FailureReason.LEASE_EXPIRED
        if transfer.deadline is not None and now >= transfer.deadline:
            return FailureReason.DEADLINE
        if transfer.is_doubted and now - transfer.progress_at >= DOUBT_SECONDS:
            return FailureReason.SENDER_LOST
        seconds = stall_limit(self._stall_seconds, transfer.sequence.request.deadline_seconds)
        is_stalled = now - transfer.progress_at >= seconds
        return FailureReason.TRANSFER_TIMEOUT if is_stalled and transfer.waits_for_peer else None
