"""All incoming transfers of a decode node, tombstones included, and how to find them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kv_transfer.failures import FailureReason
from kv_transfer.transfer import TransferState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from decode_node.incoming import IncomingSequence, IncomingTransfer


class IncomingTransfers:
    """By transfer id; the newest transfer of each sequence can be asked for."""

    def __init__(self) -> None:
        self._by_id: dict[bytes, IncomingTransfer] = {}
        self._latest: dict[str, bytes] = {}

    def __iter__(self) -> Iterator[IncomingTransfer]:
        return iter(tuple(self._by_id.values()))

    def __getitem__(self, transfer_id: bytes) -> IncomingTransfer:
        return self._by_id[transfer_id]

    @property
    def num_active(self) -> int:
        return sum(not transfer.state.is_final for transfer in self)

    @property
    def num_quarantined_blocks(self) -> int:
        quarantined = (t for t in self if t.state is TransferState.QUARANTINED)
        return sum(len(transfer.block_ids) for transfer in quarantined)

    def get(self, transfer_id: bytes, session_id: int) -> IncomingTransfer | None:
        """None too when the transfer belongs to another session."""
        transfer = self._by_id.get(transfer_id)
        return transfer if transfer is not None and transfer.session_id == session_id else None

    def find(self, transfer_id: bytes) -> IncomingTransfer | None:
        return self._by_id.get(transfer_id)

    def latest(self, sequence_id: str) -> IncomingTransfer | None:
        return self._by_id.get(self._latest.get(sequence_id, b""))

    def of_session(self, session_id: int) -> list[IncomingTransfer]:
        return [transfer for transfer in self if transfer.session_id == session_id]

    def unfinished(self, sequence_id: str) -> list[IncomingTransfer]:
        """Attempts of this sequence that still own blocks, or may come to."""
        return [
            transfer
            for transfer in self
            if transfer.sequence.sequence_id == sequence_id and not transfer.state.is_final
        ]

    def waiting_for(self, transfer_id: bytes) -> list[IncomingTransfer]:
        """Newer attempts that may ask for blocks only once this one has given its back."""
        return [transfer for transfer in self if transfer_id in transfer.is_waiting_for]

    def add(self, transfer: IncomingTransfer) -> None:
        self._by_id[transfer.transfer_id] = transfer
        self._latest[transfer.sequence.sequence_id] = transfer.transfer_id

    def forget(self, transfer: IncomingTransfer) -> None:
        del self._by_id[transfer.transfer_id]
        if self._latest.get(transfer.sequence.sequence_id) == transfer.transfer_id:
            del self._latest[transfer.sequence.sequence_id]

    def why_refused(self, sequence: IncomingSequence) -> FailureReason | None:
        """Why a new transfer may not begin: its id was used, or its sequence runs here, or a
        newer attempt of it is under way."""
        if sequence.transfer_id in self._by_id:
            return FailureReason.TICKET_INVALID
        latest = self.latest(sequence.sequence_id)
        if latest is None:
            return None
        if latest.state is TransferState.DONE or latest.is_starting:
            return FailureReason.ALREADY_STARTED
        is_newer = latest.state.is_final or sequence.attempt > latest.sequence.attempt
        return None if is_newer else FailureReason.SUPERSEDED
