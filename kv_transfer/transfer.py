"""Words that both ends of a transfer share, and how long they wait for each other."""

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


MIN_STALL_SECONDS = 2.0  # a peer that is late by less is busy


def stall_limit(most: float, deadline_seconds: float | None) -> float:
    """How long what was announced may not come: seconds, `most` or half of what its request had
    left, so that another pair can be tried, and this one be known for it."""
    if deadline_seconds is None:
        return most
    return min(most, max(MIN_STALL_SECONDS, deadline_seconds / 2))
