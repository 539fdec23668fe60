"""The hand-offs of one sender, as it keeps them: under way, and after they have ended."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cluster.errors import InternalError
from kv_transfer.protocol import CommitMessage
from kv_transfer.sending.computing import ComputingLayers

if TYPE_CHECKING:
    from collections.abc import Iterator

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
    progress_at: float  # when its machine was last seen to have moved, by the sender's clock
    is_stuck: bool = False  # its connection was cut, but what reads its sources does not end
    began_at: float = field(default_factory=time.monotonic)
    computing: ComputingLayers = field(init=False)
    _progress: object = None

    def __post_init__(self) -> None:
        self.computing = ComputingLayers(self.machine)

    @property
    def transfer_id(self) -> bytes:
        return self.handoff.transfer_id

    @property
    def sequence_id(self) -> str:
        return self.request.sequence_id

    def note_progress(self, now: float) -> None:
        """To be called when its machine may have moved."""
        if self._progress != self.machine.progress:
            self._progress, self.progress_at = self.machine.progress, now


@dataclass(frozen=True, slots=True)
class Tombstone:
    """An abort of a transfer that is over is answered with its count of frames."""

    num_frames_posted: int
    forget_at: float


class Sendings:
    """Iterates over those under way, the oldest first."""

    def __init__(self) -> None:
        self._by_sequence: dict[str, Sending] = {}
        self._by_transfer: dict[bytes, Sending] = {}
        self._tombstones: dict[bytes, Tombstone] = {}

    def __iter__(self) -> Iterator[Sending]:
        return iter(self._by_sequence.values())

    def __getitem__(self, transfer_id: bytes) -> Sending:
        return self._by_transfer[transfer_id]

    def __contains__(self, transfer_id: bytes) -> bool:
        return transfer_id in self._by_transfer

    def of_sequence(self, sequence_id: str) -> Sending | None:
        return self._by_sequence.get(sequence_id)

    def of_peer(self, peer: Peer) -> list[Sending]:
        return [sending for sending in self if sending.peer is peer]

    def find(self, transfer_id: bytes, peer: Peer) -> Sending | None:
        """None when the transfer is another peer's."""
        sending = self._by_transfer.get(transfer_id)
        return sending if sending is not None and sending.peer is peer else None

    def tombstone(self, transfer_id: bytes) -> Tombstone | None:
        return self._tombstones.get(transfer_id)

    def add(self, sending: Sending) -> None:
        self._by_sequence[sending.sequence_id] = sending
        self._by_transfer[sending.transfer_id] = sending

    def end(self, sending: Sending, *, forget_at: float) -> None:
        """Its sources are free; only its count of frames is still remembered."""
        del self._by_sequence[sending.sequence_id]
        del self._by_transfer[sending.transfer_id]
        self._tombstones[sending.transfer_id] = Tombstone(sending.machine.num_posted, forget_at)

    def forget_until(self, now: float) -> None:
        """Drop the tombstones whose time has come."""
        for transfer_id, tombstone in list(self._tombstones.items()):
            if now >= tombstone.forget_at:
                del self._tombstones[transfer_id]


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
