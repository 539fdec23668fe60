"""Whether fetching a cached prefix is quicker than computing it, by what was measured so far.

The engine's rate, and that of the way from each holder, are averages that follow what happened
last. A way that was never measured, or not lately, is not known: the only way to learn is to fetch,
which `prefix_fetches.py` does then beside computing. A holder that failed is not asked again for a
while.

What the holder has in host memory alone it must bring into its pool first. It alone knows how much
that is, and how fast: so it is told what a token may take there for the fetch still to be the
quicker way (`restore_seconds_per_token`), and gives what it can in that time.

Pure: time is an argument.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.node import NodeId

FIRST_TOKENS_PER_SECOND = 10_000.0
FIXED_SECONDS = 0.003  # two calls, a reservation, the last frame
REMEMBER_SECONDS = 300.0
AVOID_SECONDS = 30.0
MIN_LIMIT_SECONDS = 0.25
_WEIGHT = 0.3  # of the newest measurement


@dataclass(frozen=True, slots=True)
class Lacking:
    """Of what a holder has: tokens that no tier of ours has, and that a fetch saves us to compute;
    and tokens that our pool lacks, which it moves."""

    num_computed_tokens: int
    num_moved_tokens: int


@dataclass(frozen=True, slots=True)
class _Way:
    """From one holder to here."""

    bytes_per_second: float
    measured_at: float


class FetchEstimate:
    """`bytes_per_token`: of KV over all layers."""

    def __init__(self, bytes_per_token: float) -> None:
        self._bytes_per_token = bytes_per_token
        self._tokens_per_second: float | None = None
        self._ways: dict[NodeId, _Way] = {}
        self._avoided_until: dict[NodeId, float] = {}

    def compute_seconds(self, num_tokens: int) -> float:
        return num_tokens / (self._tokens_per_second or FIRST_TOKENS_PER_SECOND)

    def is_known(self, holder: NodeId, now: float) -> bool:
        """Whether the way from there was measured lately."""
        return self._way(holder, now) is not None

    def is_avoided(self, holder: NodeId, now: float) -> bool:
        """Whether it failed a moment ago."""
        return now < self._avoided_until.get(holder, 0.0)

    def limit_seconds(self, num_tokens: int) -> float:
        """How long a fetch may take before it is given up: it has then cost as much as computing
        and the same again."""
        return max(MIN_LIMIT_SECONDS, 2 * self.compute_seconds(num_tokens))

    def pays(self, holder: NodeId, lacking: Lacking, now: float) -> bool:
        """False for a way that is not known."""
        way = self._way(holder, now)
        if way is None or self.is_avoided(holder, now):
            return False
        return self._spare_seconds(way, lacking) > 0

    def restore_seconds_per_token(self, holder: NodeId, lacking: Lacking, now: float) -> float:
        """What each token may take until it is in the holder's pool. On a way that is not known it
        may take the time of computing, for nobody waits."""
        way = self._way(holder, now)
        spare = self.compute_seconds(lacking.num_computed_tokens)
        if way is not None:
            spare = self._spare_seconds(way, lacking)
        return max(0.0, spare) / max(1, lacking.num_moved_tokens)

    def _spare_seconds(self, way: _Way, lacking: Lacking) -> float:
        """By how much moving is sooner than computing."""
        moving = lacking.num_moved_tokens * self._bytes_per_token / way.bytes_per_second
        return self.compute_seconds(lacking.num_computed_tokens) - FIXED_SECONDS - moving

    def computed(self, num_tokens: int, seconds: float) -> None:
        """So many tokens took the engine so long."""
        if num_tokens > 0 and seconds > 0:
            self._tokens_per_second = _average(self._tokens_per_second, num_tokens / seconds)

    def fetched(self, holder: NodeId, num_tokens: int, seconds: float, now: float) -> None:
        """So many tokens took so long on their way from there."""
        if num_tokens <= 0 or seconds <= 0:
            return
        before = self._way(holder, now)
        rate = _average(
            None if before is None else before.bytes_per_second,
            num_tokens * self._bytes_per_token / seconds,
        )
        self._ways = {node: way for node, way in self._ways.items() if self._way(node, now)}
        self._ways[holder] = _Way(rate, now)

    def failed(self, holder: NodeId, now: float) -> None:
        for node, until in list(self._avoided_until.items()):
            if until <= now:
                del self._avoided_until[node]
        self._avoided_until[holder] = now + AVOID_SECONDS

    def _way(self, holder: NodeId, now: float) -> _Way | None:
        way = self._ways.get(holder)
        return None if way is None or now - way.measured_at >= REMEMBER_SECONDS else way


def _average(before: float | None, measured: float) -> float:
    return measured if before is None else (1 - _WEIGHT) * before + _WEIGHT * measured
