"""All incoming transfers of a decode node, and how to find them.

Those under way are few and are walked often; ended ones are remembered by the thousand, so
they are kept apart, without their prompts, and are only looked up, and swept by the timer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kv_transfer.failures import FailureReason
from kv_transfer.transfer import TransferState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kv_transfer.receiving.incoming import IncomingSequence, IncomingTransfer


class IncomingTransfers:
    """By transfer id; iterates over those under way. The newest transfer of each sequence can
    be asked for."""

    def __init__(self) -> None:
        self._active: dict[bytes, IncomingTransfer] = {}
        self._ended: dict[bytes, IncomingTransfer] = {}
        self._latest: dict[str, bytes] = {}

    def __iter__(self) -> Iterator[IncomingTransfer]:
        return iter(tuple(self._active.values()))

    def __getitem__(self, transfer_id: bytes) -> IncomingTransfer:
        return self._active[transfer_id]

    @property
    def num_active(self) -> int:
        """Under way, and not stuck: nobody waits for the ends of those."""
        return sum(not transfer.is_stuck for transfer in self)

    @property
    def num_remembered(self) -> int:
        return len(self._ended)

    @property
    def num_quarantined_blocks(self) -> int:
        quarantined = (t for t in self if t.state is TransferState.QUARANTINED)
        return sum(len(transfer.block_ids) for transfer in quarantined)

    def find(self, transfer_id: bytes) -> IncomingTransfer | None:
        """Ended ones too."""
        return self._active.get(transfer_id) or self._ended.get(transfer_id)

    def get(self, transfer_id: bytes, session_id: int) -> IncomingTransfer | None:
        """Ended ones too; None when the transfer belongs to another session."""
        transfer = self.find(transfer_id)
        return transfer if transfer is not None and transfer.session_id == session_id else None

    def latest(self, sequence_id: str) -> IncomingTransfer | None:
        return self.find(self._latest.get(sequence_id, b""))

    def of_session(self, session_id: int) -> list[IncomingTransfer]:
        return [transfer for transfer in self if transfer.session_id == session_id]

    def of_sequence(self, sequence_id: str) -> list[IncomingTransfer]:
        """Attempts of this sequence that still own blocks, or may come to."""
        return [transfer for transfer in self if transfer.sequence.sequence_id == sequence_id]

    def waiting_for(self, transfer_id: bytes) -> list[IncomingTransfer]:
        """Newer attempts that may ask for blocks only once this one has given its back."""
        return [transfer for transfer in self if transfer_id in transfer.is_waiting_for]

    def add(self, transfer: IncomingTransfer) -> None:
        self._active[transfer.transfer_id] = transfer
        self._latest[transfer.sequence.sequence_id] = transfer.transfer_id

    def end(self, transfer: IncomingTransfer, *, forget_at: float) -> None:
        """It is over; a tombstone stays until `forget_at`."""
        transfer.bury(forget_at)
        self._ended[transfer.transfer_id] = self._active.pop(transfer.transfer_id)

    def forget_until(self, now: float) -> None:
        """Drop the tombstones whose time has come, wherever they stand."""
        for transfer in tuple(self._ended.values()):
            if transfer.forget_at is not None and now >= transfer.forget_at:
                del self._ended[transfer.transfer_id]
                if self._latest.get(transfer.sequence.sequence_id) == transfer.transfer_id:
                    del self._latest[transfer.sequence.sequence_id]

    def why_refused(self, sequence: IncomingSequence) -> FailureReason | None:
        """Why a new transfer may not begin: its id was used, or its sequence runs here, or a
        newer attempt of it is under way."""
        if self.find(sequence.transfer_id) is not None:
            return FailureReason.TICKET_INVALID
        latest = self.latest(sequence.sequence_id)
        if latest is None:
            return None
        if latest.state is TransferState.DONE or latest.is_starting or latest.is_taken_over:
            return FailureReason.ALREADY_STARTED
        is_newer = latest.state.is_final or sequence.attempt > latest.sequence.attempt
        return None if is_newer else FailureReason.SUPERSEDED
