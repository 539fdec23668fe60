"""Who may come in: bounds on what is in flight, checked before any work is done.

Life of an admission
    1. `check` refuses it, with `Overloaded` and the time to wait, where the least request would be:
       before its text is worth a look. `admit` takes it in, or refuses it for what it asks.
    2. `prefilled` says that one of its sequences has its first token: it queues no more.
    3. `release` ends it, whatever happened; what still queued leaves the queue.

The time to wait is an estimate of how long the queue takes to drain at the pace seen lately,
between 1 and 60 s, spread by a quarter so that those refused do not come back together.
Pure: time and chance are arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.errors import NodeUnavailable, Overloaded

if TYPE_CHECKING:
    from collections.abc import Callable

MIN_RETRY_SECONDS = 1.0
MAX_RETRY_SECONDS = 60.0
JITTER = 0.25
_PACE_WINDOW_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds over all requests: sequences in flight, sequences and prompt tokens that queue."""

    max_num_reqs: int
    max_num_queued_reqs: int
    max_num_queued_tokens: int


class Admitted:
    """A request that was let in. See the module."""

    __slots__ = ("_admission", "_is_released", "_num_queued", "_num_sequences", "_num_tokens")

    def __init__(self, admission: Admission, num_sequences: int, num_tokens: int) -> None:
        self._admission = admission
        self._num_sequences = num_sequences
        self._num_queued = num_sequences
        self._num_tokens = num_tokens
        self._is_released = False

    def prefilled(self, num_tokens: int, now: float) -> None:
        """One of its sequences, with a prompt of `num_tokens`, has its first token."""
        if self._num_queued > 0 and not self._is_released:
            self._num_queued -= 1
            self._num_tokens -= num_tokens
            self._admission.leave_queue(1, num_tokens)
            self._admission.note_pace(num_tokens, now)

    def release(self) -> None:
        """Idempotent."""
        if not self._is_released:
            self._is_released = True
            self._admission.leave_queue(self._num_queued, self._num_tokens)
            self._admission.leave(self._num_sequences)


class Admission:
    def __init__(self, limits: Limits, *, chance: Callable[[], float]) -> None:
        """`chance` draws from [0, 1)."""
        self._limits = limits
        self._chance = chance
        self.is_closed = False
        self.num_sequences = 0
        self.num_queued = 0
        self.num_queued_tokens = 0
        # Prompt tokens that left the queue, and seconds that something queued, both of late.
        self._paced_tokens = 0.0
        self._paced_seconds = 0.0
        self._paced_from: float | None = None  # the first to leave since the queue was empty
        self._paced_at = 0.0

    def admit(self, num_sequences: int, num_tokens: int) -> Admitted:
        """`num_tokens` is the sum over its sequences of their prompts' lengths. Raises as `check`
        does."""
        self.check(num_sequences, num_tokens)
        if not self.num_queued:
            self._paced_from = None  # of the time before nothing is to be learnt
        self.num_sequences += num_sequences
        self.num_queued += num_sequences
        self.num_queued_tokens += num_tokens
        return Admitted(self, num_sequences, num_tokens)

    def check(self, num_sequences: int = 1, num_tokens: int = 1) -> None:
        """Raises `Overloaded` where so much is not let in, `NodeUnavailable` when nothing is.

        A request larger than a bound is let in when nothing else queues: it could never be.
        """
        if self.is_closed:
            raise NodeUnavailable(
                "This gateway is shutting down.",
                reason="shutting_down",
                retry_after_seconds=MIN_RETRY_SECONDS,
            )
        limits = self._limits
        if self.num_sequences and self.num_sequences + num_sequences > limits.max_num_reqs:
            raise self._overloaded("max_num_reqs")
        if self.num_queued and self.num_queued + num_sequences > limits.max_num_queued_reqs:
            raise self._overloaded("max_num_queued_reqs")
        queued = self.num_queued_tokens
        if queued and queued + num_tokens > limits.max_num_queued_tokens:
            raise self._overloaded("max_num_queued_tokens")

    def close(self) -> None:
        """Refuse everybody from now on: the gateway is stopping."""
        self.is_closed = True

    def leave_queue(self, num_sequences: int, num_tokens: int) -> None:
        self.num_queued -= num_sequences
        self.num_queued_tokens -= num_tokens

    def leave(self, num_sequences: int) -> None:
        self.num_sequences -= num_sequences

    def note_pace(self, num_tokens: int, now: float) -> None:
        """So many prompt tokens leave the queue. What was noted before fades in some seconds."""
        if self._paced_from is None:
            self._paced_from = now
        if now > self._paced_from:
            elapsed = now - self._paced_at
            kept = max(0.0, 1 - elapsed / _PACE_WINDOW_SECONDS)
            self._paced_tokens = kept * self._paced_tokens + num_tokens
            self._paced_seconds = kept * self._paced_seconds + elapsed
        self._paced_at = now

    def retry_after_seconds(self) -> float:
        seconds_per_token = self._paced_seconds / max(1.0, self._paced_tokens)
        drain = self.num_queued_tokens * seconds_per_token
        bounded = min(max(drain, MIN_RETRY_SECONDS), MAX_RETRY_SECONDS)
        spread = bounded * (1 + JITTER * (2 * self._chance() - 1))
        return min(max(spread, MIN_RETRY_SECONDS), MAX_RETRY_SECONDS)

    def _overloaded(self, reason: str) -> Overloaded:
        return Overloaded(
            "The cluster is full; ask again later.",
            reason=reason,
            retry_after_seconds=self.retry_after_seconds(),
        )
