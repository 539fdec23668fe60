"""How fast KV is read from other GPUs while this one decodes: when each read may begin.

Every byte that arrives crosses the memory that a decode step is bound by, and the kernel that reads
it shares the multiprocessors with the step's. At the rate of the link both together cost every
stream more than a new one gains by being a millisecond earlier.

Life of a read
    1. `asked`: it could begin. It waits behind what the rate allows, but for a small allowance
       ahead, which a short prompt fits in.
    2. `due`: those whose time has come, one of each transfer in turn. While nothing is decoded
       that is all of them, and what they read then is not counted.
    3. `without`: those that nobody wants any more leave.

What a first token waits for, the last layer, never waits, nor does what its transfer still lacks
then; it is counted all the same. Nothing waits for longer than `patience_seconds`: the pace gives
way before somebody could take it for a stall. How many wait is bounded by their senders' slots.

Pure: time is an argument.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

# Of reading at the rate, that may be ahead of it: more than a timer of an event loop is late, and
# one slot of 128 MiB at 32 GB/s.
_AHEAD_SECONDS = 0.004


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """One frame that could be read. `begin`, or `drop` if nobody wants it any more, is called
    once. `is_awaited`: a first token waits for it."""

    transfer_id: bytes
    num_bytes: int
    asked_at: float
    is_awaited: bool
    begin: Callable[[], None]
    drop: Callable[[], None]


class ReadPace:
    """Of all transfers of a receiver."""

    def __init__(self, bytes_per_second: float, *, patience_seconds: float) -> None:
        """`bytes_per_second` is positive, or 0: as fast as it goes. It may be changed."""
        self.bytes_per_second = bytes_per_second
        self._patience_seconds = patience_seconds
        self._even_at = float("-inf")  # when all that has begun is within the rate
        self._waiting: dict[bytes, deque[Read]] = {}  # first the transfer whose turn it is

    @property
    def is_empty(self) -> bool:
        """Nobody waits."""
        return not self._waiting

    def asked(self, read: Read, now: float, *, is_decoding: bool) -> list[Read]:
        """Those that begin now, in this order; the others wait for `due`."""
        if read.is_awaited or not self.bytes_per_second:
            begun = [*self._waiting.pop(read.transfer_id, ()), read]
            for each in begun:
                self._begun(each, now, is_decoding=is_decoding)
            return begun
        self._waiting.setdefault(read.transfer_id, deque()).append(read)
        return self.due(now, is_decoding=is_decoding)

    def due(self, now: float, *, is_decoding: bool) -> list[Read]:
        """Those that begin now, in this order."""
        begun: list[Read] = []
        while self._waiting and (not is_decoding or self.seconds_to_next(now) <= 0.0):
            begun.append(self._next(now))
            self._begun(begun[-1], now, is_decoding=is_decoding)
        return begun

    def seconds_to_next(self, now: float) -> float:
        """Until one that waits is due; there must be one."""
        within_rate = self._even_at - _AHEAD_SECONDS - now
        return min(within_rate, self._oldest().asked_at + self._patience_seconds - now)

    def without(self, is_wanted: Callable[[bytes], bool]) -> list[Read]:
        """Those of transfers that are not wanted; they do not wait any more."""
        unwanted = [each for each in self._waiting if not is_wanted(each)]
        return [read for transfer_id in unwanted for read in self._waiting.pop(transfer_id)]

    def _next(self, now: float) -> Read:
        """Of who has waited too long, else of whose turn it is."""
        oldest = self._oldest()
        is_overdue = now >= oldest.asked_at + self._patience_seconds
        transfer_id = oldest.transfer_id if is_overdue else next(iter(self._waiting))
        reads = self._waiting.pop(transfer_id)
        read = reads.popleft()
        if reads:
            self._waiting[transfer_id] = reads
        return read

    def _oldest(self) -> Read:
        return min((reads[0] for reads in self._waiting.values()), key=lambda read: read.asked_at)

    def _begun(self, read: Read, now: float, *, is_decoding: bool) -> None:
        if self.bytes_per_second and is_decoding:
            self._even_at = max(self._even_at, now) + read.num_bytes / self.bytes_per_second
