"""The receiving end of every transfer of one decode node: a pure machine.

Events come in as method calls, time as an argument; instructions go out (to `receiver.py`).

Life of an incoming transfer
    1. PENDING      `Reserve` came: `AskBlocks`. An older attempt of the same sequence is
                    aborted first and must be freed before the new one asks.
    2. ACTIVE       blocks are set aside, the ticket is out. Each frame: `frame_arrived` says
                    land or drop; a landed one is verified against its digests and scattered.
    3. COMMITTING   `Commit` came. When every announced frame is verified and no block is
                    missing: `Start`, once.
    4. DONE         the sequence runs; the blocks are its own.
    Abort, from either end, lease, deadline, a bad frame, the loss of the peer:
    5. QUARANTINED  the epoch moves on, so nothing more lands. The peer is told, stops, and
                    says how many frames it had posted; that many are drained. If it does not
                    say so in time, or is lost, its connection is cut until everything posted
                    on it has ended (`Revoke`, `session_revoked`).
    6. FAILED       only now `Free`. Never on a bare timeout.
A final transfer is remembered as long as a late message could name it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kv_transfer.failures import FailureReason, failure
from kv_transfer.lease import LeaseTable
from kv_transfer.receiving.endings import Endings
from kv_transfer.receiving.incoming import (
    EPOCH_MASK,
    BlockProgress,
    IncomingSequence,
    IncomingTransfer,
)
from kv_transfer.receiving.incoming_transfers import IncomingTransfers
from kv_transfer.receiving.intake_instructions import (
    Dropping,
    Free,
    Instruction,
    Landing,
    ReportFailed,
    ReportStranded,
    ReportWithdrawn,
    Revoke,
    SendCommitted,
    SendRefused,
    SendRenew,
    SendTicket,
    Start,
)
from kv_transfer.receiving.overdue import Overdue
from kv_transfer.transfer import TransferState

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.errors import ServingError
    from kv_transfer.protocol import FrameHeader


class Intake:
    """`draw_nonce` gives unpredictable 64-bit numbers. `stall_seconds`: how long what was
    announced, a payload or all frames of a commit, may not come at the most, however alive the
    peer is."""

    def __init__(
        self,
        *,
        incarnation: int,
        num_layers: int,
        lease_seconds: float,
        drain_seconds: float,
        stall_seconds: float,
        draw_nonce: Callable[[], int],
    ) -> None:
        self._incarnation = incarnation
        self._num_layers = num_layers
        self._draw_nonce = draw_nonce
        self._leases = LeaseTable(lease_seconds)
        self._overdue = Overdue(self._leases, stall_seconds=stall_seconds)
        self.transfers = IncomingTransfers()
        self._endings = Endings(self.transfers, self._leases, drain_seconds=drain_seconds)
        self._open_sessions: set[int] = set()
        self._epoch = 0

    def remaining_seconds(self, transfer_id: bytes, now: float) -> float:
        return self._leases.remaining_seconds(transfer_id, now)

    # ---- sessions -------------------------------------------------------------------------

    def session_opened(self, session_id: int) -> None:
        self._open_sessions.add(session_id)

    def session_lost(
        self, session_id: int, now: float, reason: FailureReason = FailureReason.SENDER_LOST
    ) -> list[Instruction]:
        """Nothing more will come from this peer, and what was posted must be ended."""
        if session_id not in self._open_sessions:
            return []
        self._open_sessions.remove(session_id)
        instructions: list[Instruction] = []
        for transfer in self.transfers.of_session(session_id):
            instructions += self._endings.abort(transfer, failure(reason), now)
        return [*instructions, Revoke(session_id)]

    def num_stuck_blocks(self, session_id: int) -> int:
        """Those that do not come back. A sequence on its way to the engine has its own."""
        stuck = (each for each in self.transfers.of_session(session_id) if each.is_stuck)
        return sum(len(each.block_ids) for each in stuck)

    def revocation_failed(self, session_id: int, now: float) -> list[Instruction]:
        """The connection is cut, but something posted on it does not end. Its blocks stay in
        quarantine for good: newer attempts, or the node itself, have waited for them in vain."""
        lost = failure(FailureReason.LINK_LOST)
        instructions: list[Instruction] = []
        for transfer in self.transfers.of_session(session_id):
            transfer.is_stuck = not transfer.is_starting
            if transfer.is_taken_over:
                instructions.append(ReportStranded(transfer.sequence, lost))
            for newer in self.transfers.waiting_for(transfer.transfer_id):
                instructions += self._endings.abort(newer, lost, now)
        return instructions

    def session_revoked(self, session_id: int, now: float) -> list[Instruction]:
        """The session's connection is cut and every operation posted on it has ended."""
        instructions: list[Instruction] = []
        for transfer in self.transfers.of_session(session_id):
            transfer.is_cut = True
            instructions += self._endings.settle(transfer, now)
        return instructions

    # ---- reserving ------------------------------------------------------------------------

    def reserve_asked(
        self, session_id: int, sequence: IncomingSequence, now: float
    ) -> list[Instruction]:
        if session_id not in self._open_sessions:
            return []
        refused = self.transfers.why_refused(sequence)
        if refused is not None:
            return [SendRefused(session_id, sequence.transfer_id, failure(refused))]
        older = self.transfers.of_sequence(sequence.sequence_id)
        if any(each.is_stuck for each in older):
            lost = failure(FailureReason.LINK_LOST)
            return [SendRefused(session_id, sequence.transfer_id, lost)]
        transfer = IncomingTransfer.begin(
            sequence, session_id, epoch=self._next_epoch(), nonce=self._draw_nonce(), now=now
        )
        self.transfers.add(transfer)
        self._leases.grant(sequence.transfer_id, now)
        transfer.is_waiting_for = {other.transfer_id for other in older}
        instructions: list[Instruction] = []
        for other in older:
            error = failure(FailureReason.SUPERSEDED)
            instructions += self._endings.abort(
                other, error, now, report=ReportWithdrawn(other.sequence)
            )
        return instructions + self._endings.ask_if_first(transfer)

    def reserved(
        self, transfer_id: bytes, block_ids: tuple[int, ...], num_held_blocks: int, now: float
    ) -> list[Instruction]:
        transfer = self.transfers[transfer_id]
        transfer.is_asking = False
        transfer.block_ids = block_ids
        if transfer.state is not TransferState.PENDING:
            return self._endings.settle(transfer, now)
        missing = tuple(range(num_held_blocks, len(block_ids)))
        transfer.progress = BlockProgress(missing, self._num_layers)
        transfer.state = TransferState.ACTIVE
        transfer.progress_at = now
        seconds = self._leases.remaining_seconds(transfer_id, now)
        ticket = transfer.ticket(self._incarnation, missing, expires_in_seconds=seconds)
        return [SendTicket(transfer.session_id, ticket)]

    def reserve_failed(
        self, transfer_id: bytes, error: ServingError, now: float
    ) -> list[Instruction]:
        """The block source has no place, ever, or was told to stop asking."""
        transfer = self.transfers[transfer_id]
        transfer.is_asking = False
        if transfer.state is not TransferState.PENDING:
            return self._endings.settle(transfer, now)
        transfer.error = error
        refused = SendRefused(transfer.session_id, transfer_id, error)
        return [refused, *self._endings.finish(transfer, TransferState.FAILED, now)]

    # ---- frames ---------------------------------------------------------------------------

    def frame_arrived(
        self, session_id: int, header: FrameHeader, now: float
    ) -> tuple[Landing | Dropping, list[Instruction]]:
        """What to do with the payload behind this header. It is received in any case."""
        transfer = self.transfers.get(header.transfer_id, session_id)
        if transfer is None:
            invalid = FailureReason.TICKET_INVALID
            return Dropping(header.transfer_id, invalid, is_counted=False), []
        reason = transfer.why_not_ours(header, self._incarnation)
        if reason is not None:
            return Dropping(header.transfer_id, reason, is_counted=False), []
        overdue = self._overdue.why(transfer, now)
        problem = transfer.announce(header) or overdue
        transfer.progress_at = now
        if not transfer.is_receiving:
            return Dropping(header.transfer_id, FailureReason.ABORTED, is_counted=True), []
        if problem is not None:
            dropping = Dropping(header.transfer_id, problem, is_counted=True)
            return dropping, self._endings.abort(transfer, failure(problem), now)
        block_ids = transfer.block_ids_at(header.positions)
        is_last = transfer.progress.is_announced
        landing = Landing(
            transfer_id=header.transfer_id,
            seq=header.seq,
            block_ids=block_ids,
            table=transfer.block_ids,
            digest_seed=transfer.digest_seed,
            is_last=is_last,
        )
        return landing, []

    def may_scatter(self, transfer_id: bytes) -> bool:
        """Whether a landed payload is still wanted; asked right before it is scattered."""
        transfer = self.transfers.find(transfer_id)
        return transfer is not None and transfer.is_receiving

    def frame_ended(
        self,
        transfer_id: bytes,
        error: ServingError | None,
        verified: FrameHeader | None,
        now: float,
    ) -> list[Instruction]:
        """A landing frame was scattered and is as its header says (`verified`), or was dropped."""
        transfer = self.transfers.find(transfer_id)
        if transfer is None:
            return []
        transfer.num_landing -= 1
        if not transfer.is_receiving:
            return self._endings.settle(transfer, now)
        if error is not None:
            return self._endings.abort(transfer, error, now)
        transfer.progress_at = now
        if verified is not None:
            transfer.progress.verify(verified)
        transfer.num_verified += 1
        return self._start_if_complete(transfer, now)

    # ---- committing -----------------------------------------------------------------------

    def commit_asked(
        self,
        session_id: int,
        transfer_id: bytes,
        *,
        nonce: int,
        epoch: int,
        num_frames: int,
        first_token_id: int,
        now: float,
    ) -> list[Instruction]:
        """Asked again, the stored result is sent again."""
        transfer = self.transfers.get(transfer_id, session_id)
        if transfer is None or (transfer.nonce, transfer.epoch) != (nonce, epoch):
            error = failure(FailureReason.TICKET_INVALID)
            return [SendCommitted(session_id, transfer_id, error)]
        if transfer.state is TransferState.DONE:
            return [SendCommitted(session_id, transfer_id, None)]
        if transfer.state is TransferState.ACTIVE:
            transfer.state = TransferState.COMMITTING
            transfer.progress_at = now
            transfer.num_committed = num_frames
            transfer.first_token_id = first_token_id
            return self._start_if_complete(transfer, now)
        if transfer.state is TransferState.COMMITTING:
            return []
        error = transfer.error or failure(FailureReason.TICKET_INVALID)
        return [SendCommitted(session_id, transfer_id, error)]

    def started(self, transfer_id: bytes, now: float) -> list[Instruction]:
        transfer = self.transfers[transfer_id]
        transfer.is_starting = False
        committed = SendCommitted(transfer.session_id, transfer_id, None)
        return [committed, *self._endings.finish(transfer, TransferState.DONE, now)]

    def start_failed(
        self, transfer_id: bytes, error: ServingError, now: float
    ) -> list[Instruction]:
        """The node could not take the sequence over; the blocks are still the transfer's."""
        transfer = self.transfers[transfer_id]
        transfer.is_starting = False
        transfer.error = error
        return [
            SendCommitted(transfer.session_id, transfer_id, error),
            ReportFailed(transfer.sequence, error),
            Free(transfer.sequence),
            *self._endings.finish(transfer, TransferState.FAILED, now),
        ]

    def taken_over(self, transfer_id: bytes) -> None:
        """The transfer failed, and the node goes on with its sequence all the same."""
        transfer = self.transfers.find(transfer_id)
        if transfer is not None:
            transfer.is_taken_over = True

    # ---- aborting -------------------------------------------------------------------------

    def sender_aborted(
        self,
        session_id: int,
        transfer_id: bytes,
        num_frames_posted: int,
        error: ServingError | None,
        now: float,
    ) -> list[Instruction]:
        """`error` None: the prefill node needs the transfer no more."""
        transfer = self.transfers.get(transfer_id, session_id)
        if transfer is None or transfer.state.is_final:
            return []
        transfer.num_to_drain = num_frames_posted
        if transfer.state is TransferState.QUARANTINED:
            return self._endings.settle(transfer, now)
        report = ReportWithdrawn(transfer.sequence) if error is None else None
        reported = error or failure(FailureReason.WITHDRAWN)
        return self._endings.abort(transfer, reported, now, report=report, tells_peer=False)

    def abort_acked(
        self, session_id: int, transfer_id: bytes, epoch: int, num_frames_posted: int, now: float
    ) -> list[Instruction]:
        transfer = self.transfers.get(transfer_id, session_id)
        if transfer is None or transfer.state is not TransferState.QUARANTINED:
            return []
        if epoch != transfer.abort_epoch:
            return []
        transfer.num_to_drain = num_frames_posted
        return self._endings.settle(transfer, now)

    def cancelled(self, sequence_id: str, error: ServingError, now: float) -> list[Instruction]:
        """The node wants the sequence no more. Nothing when it runs or was never reserved."""
        transfer = self.transfers.latest(sequence_id)
        if transfer is None:
            return []
        return self._endings.abort(transfer, error, now, report=ReportWithdrawn(transfer.sequence))

    def sender_doubted(self, sequence_id: str, now: float) -> list[Instruction]:
        """A gateway has lost the node that sends it. What moves goes on: the gateway may be wrong.
        What stands still ends as if its connection were lost, sooner than this end can know."""
        transfer = self.transfers.latest(sequence_id)
        if transfer is None or transfer.state.is_final:
            return []
        transfer.is_doubted = True
        self._endings.hurry(transfer, now)
        return self._end_if_overdue(transfer, now)

    def renewed(
        self, session_id: int, transfer_id: bytes, extend_seconds: float, now: float
    ) -> None:
        if self.transfers.get(transfer_id, session_id) is not None:
            self._leases.renew(transfer_id, extend_seconds, now)

    def ticked(self, now: float) -> list[Instruction]:
        """Sweep everything: leases, deadlines, drains that take too long, tombstones."""
        instructions: list[Instruction] = []
        for transfer in self.transfers:
            instructions += self._end_if_overdue(transfer, now)
            if transfer.drain_deadline is not None and now >= transfer.drain_deadline:
                lost = FailureReason.LINK_LOST
                instructions += self.session_lost(transfer.session_id, now, lost)
        self.transfers.forget_until(now)
        for transfer_id in self._leases.due_renewals(now):
            session_id = self.transfers[transfer_id].session_id
            extension = self._leases.extension_seconds
            instructions.append(SendRenew(session_id, transfer_id, extension))
        return instructions

    # ---- steps ----------------------------------------------------------------------------

    def _start_if_complete(self, transfer: IncomingTransfer, now: float) -> list[Instruction]:
        num_committed = transfer.num_committed
        if num_committed is None or transfer.num_verified < num_committed:
            return []
        overdue = self._overdue.why(transfer, now)
        if overdue is not None:
            return self._endings.abort(transfer, failure(overdue), now)
        if transfer.num_arrived > num_committed:
            return self._endings.abort(transfer, failure(FailureReason.FRAME_UNEXPECTED), now)
        if not transfer.progress.is_complete:
            return self._endings.abort(transfer, failure(FailureReason.INCOMPLETE), now)
        transfer.is_starting = True
        self._leases.release(transfer.transfer_id)
        return [Start(transfer.sequence, transfer.first_token_id)]

    def _end_if_overdue(self, transfer: IncomingTransfer, now: float) -> list[Instruction]:
        overdue = self._overdue.why(transfer, now)
        return [] if overdue is None else self._endings.abort(transfer, failure(overdue), now)

    def _next_epoch(self) -> int:
        """Two apart: the one between is that of the ticket's abort."""
        self._epoch = (self._epoch + 2) & EPOCH_MASK
        return self._epoch
