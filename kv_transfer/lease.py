"""Leases on blocks in transfer: who holds them, until when, and when to renew the peer's.

Life of a lease
    1. `grant`: the blocks are kept for `duration_seconds` whatever the peer does.
    2. `renew`: the peer is alive and wants them; the deadline moves to
       max(old deadline, now + extension), never back and never past one full duration.
    3. `release`: the transfer ended. Or `expire`: a sweep found the deadline passed. Sweeps
       look at every lease: nothing is assumed about their order.

Both ends keep a table of the leases they granted, on their own blocks. Each tells the other,
every `renew_interval_seconds`, which ones it still needs (`due_renewals`), as a duration.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

RENEWALS_PER_LEASE = 6


@dataclass(slots=True)
class Lease:
    """`deadline` and `renew_at` are monotonic instants of this process."""

    id: bytes
    deadline: float
    renew_at: float


class LeaseTable:
    """The leases of one node. Pure: time is an argument."""

    def __init__(self, duration_seconds: float) -> None:
        self.duration_seconds = duration_seconds
        self._leases: dict[bytes, Lease] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def __contains__(self, lease_id: bytes) -> bool:
        return lease_id in self._leases

    @property
    def renew_interval_seconds(self) -> float:
        return self.duration_seconds / RENEWALS_PER_LEASE

    @property
    def extension_seconds(self) -> float:
        """What one renewal asks for: two thirds of a lease."""
        return self.duration_seconds * 2 / 3

    def grant(self, lease_id: bytes, now: float) -> Lease:
        lease = Lease(lease_id, now + self.duration_seconds, now + self.renew_interval_seconds)
        self._leases[lease_id] = lease
        return lease

    def renew(self, lease_id: bytes, extend_seconds: float, now: float) -> bool:
        """False when there is nothing to renew: unknown, released or already past."""
        lease = self._leases.get(lease_id)
        if lease is None or now >= lease.deadline or not math.isfinite(extend_seconds):
            return False
        extension = min(max(extend_seconds, 0.0), self.duration_seconds)
        lease.deadline = max(lease.deadline, now + extension)
        return True

    def release(self, lease_id: bytes) -> None:
        """Idempotent."""
        self._leases.pop(lease_id, None)

    def is_live(self, lease_id: bytes, now: float) -> bool:
        lease = self._leases.get(lease_id)
        return lease is not None and now < lease.deadline

    def remaining_seconds(self, lease_id: bytes, now: float) -> float:
        """What may be told to others: a duration, 0 when there is no lease."""
        lease = self._leases.get(lease_id)
        return 0.0 if lease is None else max(0.0, lease.deadline - now)

    def expire(self, now: float) -> list[bytes]:
        """Remove and return every lease whose deadline has passed."""
        expired = [lease.id for lease in self._leases.values() if now >= lease.deadline]
        for lease_id in expired:
            del self._leases[lease_id]
        return expired

    def due_renewals(self, now: float) -> list[bytes]:
        """The leases whose counterpart at the peer should be renewed now."""
        due = [lease for lease in self._leases.values() if now >= lease.renew_at]
        for lease in due:
            lease.renew_at = now + self.renew_interval_seconds
        return [lease.id for lease in due]
