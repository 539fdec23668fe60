"""What transfers did, as plain counters; the node turns them into metrics."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cluster.errors import Cancelled
from kv_transfer.failures import FailureReason, failure_label

if TYPE_CHECKING:
    from cluster.errors import ServingError
    from cluster.request import KVLoadFailurePolicy

# One flipped bit is weather; a peer that corrupts again and again has a fault of its own.
CORRUPT_FRAMES_OF_A_SUSPECT = 3


@dataclass(slots=True)
class TransferStats:
    """Counters since start, except `num_*` gauges. Labels are few: transports, reasons, peers."""

    bytes_by_transport: Counter[str] = field(default_factory=Counter)  # KV moved
    seconds_by_transport: dict[str, float] = field(default_factory=dict)  # in flight, summed
    frames: int = 0
    reads_held_back: int = 0  # frames that waited for the pace
    transfers_done: int = 0
    transfer_seconds: float = 0.0  # reserve to commit, summed over transfers done
    failures: Counter[tuple[str, str]] = field(default_factory=Counter)  # by reason and policy
    commits_unknown: int = 0  # no failures yet: the receiver counts what became of them
    recomputes: Counter[str] = field(default_factory=Counter)  # by reason
    frames_dropped: Counter[str] = field(default_factory=Counter)  # by reason
    corrupt_frames_by_peer: Counter[str] = field(default_factory=Counter)
    handshakes_refused: int = 0
    pairings: int = 0
    revocations: int = 0

    def failed(self, error: ServingError, policy: KVLoadFailurePolicy) -> None:
        """A transfer came to no end. One that was cancelled, by its client or by who gave it up, is
        no trouble of the nodes. Of one whose commit was not answered a sender never hears whether
        it failed: its sequence may run."""
        if error.reason == FailureReason.COMMIT_UNKNOWN:
            self.commits_unknown += 1
        elif not isinstance(error, Cancelled):
            self.failures[failure_label(error), policy.value] += 1

    def corrupt(self, peer: str) -> bool:
        """A frame of `peer` was not what it had sent. True when that makes it a suspect."""
        self.corrupt_frames_by_peer[peer] += 1
        return self.corrupt_frames_by_peer[peer] == CORRUPT_FRAMES_OF_A_SUSPECT

    def moved(self, transport: str, num_bytes: int, seconds: float) -> None:
        """One frame has moved."""
        self.frames += 1
        self.bytes_by_transport[transport] += num_bytes
        spent = self.seconds_by_transport.get(transport, 0.0)
        self.seconds_by_transport[transport] = spent + seconds
