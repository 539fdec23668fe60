"""One hand-off as the sender keeps it: under way, and after it has ended."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.request import Handoff, SequenceRequest
    from kv_transfer.sending.outgoing import OutgoingTransfer
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
