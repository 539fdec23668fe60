"""What the intake tells its shell to do. See `intake.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.errors import ServingError
    from kv_transfer.failures import FailureReason
    from kv_transfer.receiving.incoming import IncomingSequence
    from kv_transfer.transfer import Ticket


@dataclass(frozen=True, slots=True)
class AskBlocks:
    sequence: IncomingSequence


@dataclass(frozen=True, slots=True)
class StopAsking:
    """Blocks are not wanted any more; `reserve_failed` or `reserved` still answers."""

    transfer_id: bytes


@dataclass(frozen=True, slots=True)
class SendTicket:
    session_id: int
    ticket: Ticket


@dataclass(frozen=True, slots=True)
class SendRefused:
    session_id: int
    transfer_id: bytes
    error: ServingError


@dataclass(frozen=True, slots=True)
class Start:
    sequence: IncomingSequence
    first_token_id: int


@dataclass(frozen=True, slots=True)
class SendCommitted:
    """`error` None: the sequence runs."""

    session_id: int
    transfer_id: bytes
    error: ServingError | None


@dataclass(frozen=True, slots=True)
class SendAbort:
    session_id: int
    transfer_id: bytes
    epoch: int
    error: ServingError


@dataclass(frozen=True, slots=True)
class SendRenew:
    session_id: int
    transfer_id: bytes
    extend_seconds: float


@dataclass(frozen=True, slots=True)
class Revoke:
    """Cut the session's connection, wait until everything posted on it has ended."""

    session_id: int


@dataclass(frozen=True, slots=True)
class Free:
    """Nothing can write into the transfer's blocks any more. The first `num_good_blocks` hold
    verified KV, if a `ReportFailed` has said that this may be of use."""

    sequence: IncomingSequence
    num_good_blocks: int = 0


@dataclass(frozen=True, slots=True)
class ReportFailed:
    """`num_good_blocks`: so many are verified, and the node may compute the rest once they are
    freed; None: it may not."""

    sequence: IncomingSequence
    error: ServingError
    num_good_blocks: int | None = None


@dataclass(frozen=True, slots=True)
class ReportStranded:
    """The node was to go on with it, once its blocks are freed: they never will be."""

    sequence: IncomingSequence
    error: ServingError


@dataclass(frozen=True, slots=True)
class ReportWithdrawn:
    """The prefill node needs the transfer no more: it ended there, without a failure."""

    sequence: IncomingSequence


Instruction = (
    AskBlocks
    | StopAsking
    | SendTicket
    | SendRefused
    | Start
    | SendCommitted
    | SendAbort
    | SendRenew
    | Revoke
    | Free
    | ReportFailed
    | ReportStranded
    | ReportWithdrawn
)


@dataclass(frozen=True, slots=True)
class Landing:
    """A frame to receive into a slot and then into `block_ids`, after its digests held. `table`:
    all block ids of its transfer, by position. `is_last`: with it nothing of the transfer is
    missing."""

    transfer_id: bytes
    seq: int
    block_ids: tuple[int, ...]
    table: tuple[int, ...]
    digest_seed: int
    is_last: bool


@dataclass(frozen=True, slots=True)
class Dropping:
    """A frame to receive into scratch memory. `is_counted`: it is one of the transfer's own,
    so `frame_ended` must be told when its payload is gone."""

    transfer_id: bytes
    reason: FailureReason
    is_counted: bool
