"""One hand-off as the sender keeps it: under way, and after it has ended."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cluster.errors import InternalError
from kv_transfer.protocol import CommitMessage
from kv_transfer.sending.computing import ComputingLayers

if TYPE_CHECKING:
    from cluster.request import Handoff, SequenceRequest
    from kv_transfer.sending.outgoing import OutgoingTransfer
    from kv_transfer.sending.outgoing_instructions import SendCommit
    from kv_transfer.sending.peer import Peer


@dataclass(slots=True)
class Sending:
    """One hand-off under way."""

    request: SequenceRequest
    handoff: Handoff
    machine: OutgoingTransfer
    digest_seed: int
    peer: Peer
    progress_at: float  # when its machine last moved, by the sender's clock
    began_at: float = field(default_factory=time.monotonic)
    computing: ComputingLayers = field(init=False)

    def __post_init__(self) -> None:
        self.computing = ComputingLayers(self.machine)

    @property
    def transfer_id(self) -> bytes:
        return self.handoff.transfer_id

    @property
    def sequence_id(self) -> str:
        return self.request.sequence_id


@dataclass(frozen=True, slots=True)
class Tombstone:
    """An abort of a transfer that is over is answered with its count of frames."""

    num_frames_posted: int
    forget_at: float


def commit_message(commit: SendCommit, sending: Sending) -> CommitMessage:
    ticket = sending.machine.ticket
    if ticket is None:
        raise InternalError("A commit needs a ticket.")
    return CommitMessage(
        transfer_id=sending.transfer_id,
        epoch=ticket.epoch,
        nonce=ticket.nonce,
        num_frames=commit.num_frames,
        first_token_id=commit.first_token_id,
    )
