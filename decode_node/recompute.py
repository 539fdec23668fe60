"""How much lost KV a decode node may compute itself: it must not become a prefill node.

A failed hand-off of one sequence costs one prefill of what is missing. Many at once (a prefill
node that dies, a link that breaks) would stall everyone's decode, so two bounds hold: recomputes
under way, and tokens per second averaged over the last ten. Over either, the policy is `fail`.

Pure: time is an argument.
"""

from __future__ import annotations

SAVED_SECONDS = 10.0


class RecomputeBudget:
    """`tokens_per_second` fills a bucket of ten seconds' worth; an admitted recompute takes its
    tokens from it, below zero if it is the only one: one long prompt is no storm."""

    def __init__(self, *, max_concurrent: int, tokens_per_second: float, now: float) -> None:
        self._max_concurrent = max_concurrent
        self._rate = tokens_per_second
        self._tokens = SAVED_SECONDS * tokens_per_second
        self._filled_at = now
        self._running: set[str] = set()

    @property
    def num_running(self) -> int:
        return len(self._running)

    def admit(self, sequence_id: str, num_tokens: int, now: float) -> bool:
        """Whether `num_tokens` may be computed for it; it then counts until `end`."""
        most = SAVED_SECONDS * self._rate
        self._tokens = min(most, self._tokens + (now - self._filled_at) * self._rate)
        self._filled_at = now
        if len(self._running) >= self._max_concurrent or self._tokens <= 0.0:
            return False
        if self._running and num_tokens > self._tokens:
            return False
        self._tokens -= num_tokens
        self._running.add(sequence_id)
        return True

    def end(self, sequence_id: str) -> None:
        """It is computed, or not wanted any more. Idempotent; others are not its concern."""
        self._running.discard(sequence_id)
