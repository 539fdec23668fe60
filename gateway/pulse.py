"""Whether a process still runs, as one who pings it can tell. Pure: time is an argument.

Life of a judgement
    1. `opened`: there is a way to ping. `tick`, every `TICK_SECONDS`, says which ping to send.
    2. Each answer says how late this peer's answers are: worst of late, slowly forgotten.
    3. A peer is silent when several pings in a row have no answer and the first of them has waited
       longer than `patience`: a set time, or some times the worst lateness, where that is more.
    4. Silence makes more patient: if the peer was only slow, the next time it gets twice as long.

Waiting is counted in time that this process was awake, never more than a tick from one tick to the
next: after a stop of our own, or on a machine without a free core, what was answered meanwhile is
read before anybody is blamed.

Two things are judged apart. A ping is answered below Python (`http2_pings.py`), whatever the event
loop and the engine are at: no answer means that the process is stopped, or its machine out of
reach. Whether its event loop hangs is asked by a call, with far more patience.
"""

from __future__ import annotations

TICK_SECONDS = 0.25
IDLE_TICKS = 4  # between two pings when nobody waits for the peer
MIN_UNANSWERED = 4
LATE_FACTOR = 3.0
MAX_FACTOR = 3.0  # of the set time, which patience never exceeds
KEPT_SHARE = 0.98  # of the worst lateness, with each answer: half of it after 35


class Pulse:
    """Of one peer, over all connections with it. `timeout`: the least patience, in seconds."""

    __slots__ = (
        "_awake_seconds",
        "_num_ticks",
        "_number",
        "_sent_at",
        "_ticked_at",
        "_timeout",
        "_worst_seconds",
        "is_silent",
    )

    def __init__(self, *, timeout: float) -> None:
        self.is_silent = False  # until it is pinged anew
        self._timeout = timeout
        self._worst_seconds = 0.0
        self._awake_seconds = 0.0
        self._ticked_at = 0.0
        self._num_ticks = 0  # since the last ping
        self._number = 0
        self._sent_at: dict[int, float] = {}  # of those without an answer, in order; awake time

    @property
    def patience(self) -> float:
        """How long the first of several pings may wait for its answer, in seconds."""
        usual = max(self._timeout, LATE_FACTOR * self._worst_seconds)
        return min(usual, MAX_FACTOR * self._timeout)

    def opened(self, now: float) -> None:
        """A new connection: what was sent before is answered by nobody."""
        self.is_silent = False
        self._sent_at.clear()
        self._ticked_at = now
        self._num_ticks = IDLE_TICKS

    def tick(self, now: float, *, is_urgent: bool) -> int | None:
        """The number of the ping to send now; None: none. `is_urgent`: somebody waits for the
        peer. May find the peer silent."""
        self._awake_seconds = self._awake_at(now)
        self._ticked_at = now
        self._num_ticks += 1
        if not self.is_silent and self._has_waited_enough():
            self.is_silent = True
            self._worst_seconds = max(self._worst_seconds, 2 * self.patience / LATE_FACTOR)
        if self.is_silent:
            return None
        if not is_urgent and self._num_ticks < IDLE_TICKS:
            return None
        self._num_ticks = 0
        self._number += 1
        self._sent_at[self._number] = self._awake_seconds
        return self._number

    def answered(self, number: int, now: float) -> None:
        """Answers come in order: one stands for all before it."""
        sent_at = self._sent_at.pop(number, None)
        if sent_at is None:
            return
        self._sent_at = {each: at for each, at in self._sent_at.items() if each > number}
        lateness = self._awake_at(now) - sent_at
        self._worst_seconds = max(lateness, KEPT_SHARE * self._worst_seconds)

    def _has_waited_enough(self) -> bool:
        if len(self._sent_at) < MIN_UNANSWERED:
            return False
        first = next(iter(self._sent_at.values()))
        return self._awake_seconds - first >= self.patience

    def _awake_at(self, now: float) -> float:
        return self._awake_seconds + min(now - self._ticked_at, TICK_SECONDS)
