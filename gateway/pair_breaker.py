"""Which pairs of nodes are held back: those between which hand-offs fail though both nodes live.

Life of a pair here: a prefill node and a decode node, both of one incarnation
    CLOSED     it is taken like any other. Hand-offs that fail in a row are counted
    OPEN       `FAILURES_IN_A_ROW` failed: held back for a pause, 2 s at first
    HALF_OPEN  the pause is over: one sequence is tried between the two, the probe. Until it is
               known how that ends the pair is held back from all others

What may happen, in any order
    begun      a sequence is placed on the pair. In HALF_OPEN the first one is the probe
    succeeded  KV was handed over, whoever carried it: CLOSED, and all failures are forgotten
    failed     in CLOSED it is counted; the probe opens the pair again, for twice as long, a minute
               at most. Of any other it says nothing new: it began before, or had no other pair
    released   it ended and says nothing about the pair: a probe gives its turn back

So no failure holds a pair back for ever, and one that is broken costs a request in a minute. What
is held back is advice: the router takes such a pair where there is no other. A link that breaks
once may fail several hand-offs together, and hold its pair back: that costs two seconds elsewhere,
where counting less would give a pair that swallows everything three timeouts, one after the other.

Only pairs with failures are kept; `keep` forgets those of nodes that are gone. Each gateway learns
from its own sequences. Pure: time is an argument.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.node import NodeId

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

Pair = tuple[NodeId, NodeId]  # prefill, decode

FAILURES_IN_A_ROW = 3
FIRST_PAUSE_SECONDS = 2.0
MAX_PAUSE_SECONDS = 60.0
NO_PAIRS: frozenset[Pair] = frozenset()


@dataclass(frozen=True, slots=True)
class OpenPair:
    """A pair that is not closed, for people. `seconds`: until it is tried again; 0 when that is
    due, or under way. `reason`: of the last failure that counted."""

    pair: Pair
    reason: str
    seconds: float


@dataclass(slots=True)
class _Record:
    """A pair with failures. `pause` 0: closed."""

    reason: str = ""
    num_failures: int = 0
    pause: float = 0.0
    until: float = 0.0
    probe: str | None = None  # the attempt that is tried

    @property
    def is_closed(self) -> bool:
        return self.pause == 0.0

    def is_held_back(self, now: float) -> bool:
        return not self.is_closed and (now < self.until or self.probe is not None)

    def open(self, now: float) -> None:
        self.pause = min(MAX_PAUSE_SECONDS, 2 * self.pause or FIRST_PAUSE_SECONDS)
        self.until = now + self.pause
        self.probe = None


class PairBreaker:
    """See the module. Sequences are named by the id of their attempt."""

    def __init__(self) -> None:
        self._records: dict[Pair, _Record] = {}

    @property
    def num_open(self) -> int:
        """Those that are not closed."""
        return sum(not record.is_closed for record in self._records.values())

    def held_back(self, now: float) -> AbstractSet[Pair]:
        if not self._records:
            return NO_PAIRS
        records = self._records.items()
        return frozenset(pair for pair, record in records if record.is_held_back(now))

    def open_pairs(self, now: float) -> list[OpenPair]:
        return [
            OpenPair(pair, record.reason, max(0.0, record.until - now))
            for pair, record in self._records.items()
            if not record.is_closed
        ]

    def begun(self, pair: Pair, attempt_id: str, now: float) -> None:
        record = self._records.get(pair)
        if record is not None and not record.is_closed and not record.is_held_back(now):
            record.probe = attempt_id

    def succeeded(self, pair: Pair) -> bool:
        """True: it is taken again."""
        record = self._records.pop(pair, None)
        return record is not None and not record.is_closed

    def failed(self, pair: Pair, attempt_id: str, reason: str, now: float) -> float | None:
        """The pause, if the pair is held back from now on."""
        record = self._records.setdefault(pair, _Record())
        if not record.is_closed and record.probe != attempt_id:
            return None
        record.reason = reason
        record.num_failures += 1
        if record.num_failures < FAILURES_IN_A_ROW:
            return None
        record.open(now)
        return record.pause

    def released(self, pair: Pair, attempt_id: str) -> None:
        record = self._records.get(pair)
        if record is not None and record.probe == attempt_id:
            record.probe = None

    def keep(self, nodes: AbstractSet[NodeId]) -> None:
        """Forget the pairs of all other nodes."""
        gone = [pair for pair in self._records if not nodes >= set(pair)]
        for pair in gone:
            del self._records[pair]
