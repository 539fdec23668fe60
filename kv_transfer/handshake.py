"""Agree before anything is sent: compare first, read the rest after.

A mismatch concerns one pair of nodes. It is refused with `HandshakeMismatch` on both sides;
each goes on serving its other peers.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.errors import HandshakeMismatch
from kv_transfer.failures import FailureReason, failure


@dataclass(frozen=True, slots=True)
class Compatibility:
    """What must be equal on two nodes before they may exchange KV."""

    protocol_version: int
    compatibility_hash: str

    def check(self, theirs: Compatibility) -> None:
        """Raises `HandshakeMismatch` that says which fact differs."""
        if self.protocol_version != theirs.protocol_version:
            raise HandshakeMismatch(
                f"The nodes speak protocol versions {self.protocol_version} and "
                f"{theirs.protocol_version}.",
                reason=FailureReason.LAYOUT_MISMATCH.value,
            )
        if self.compatibility_hash != theirs.compatibility_hash:
            raise failure(FailureReason.LAYOUT_MISMATCH)
