"""Words that both ends of a transfer share."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class TransferState(StrEnum):
    """Where a transfer stands, at either end. DONE and FAILED are final."""

    PENDING = "pending"  # reserve asked, no ticket yet
    ACTIVE = "active"  # frames may move
    COMMITTING = "committing"  # all frames are announced; the sequence is about to start
    QUARANTINED = "quarantined"  # ended, but an operation may still touch its memory
    DONE = "done"
    FAILED = "failed"

    @property
    def is_final(self) -> bool:
        return self in (TransferState.DONE, TransferState.FAILED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """The receiver's single-use permission to send one prompt's KV.

    `missing_positions` are the block positions to send, ascending; the others are held there
    already. `incarnation` is the receiver's, `nonce` tags every payload.
    """

    transfer_id: bytes
    incarnation: int
    epoch: int
    nonce: int
    expires_in_seconds: float
    missing_positions: tuple[int, ...]
