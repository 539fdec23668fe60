"""Whether fetching a cached prefix is quicker than computing it, by what was measured so far.

What the engine computes and what comes from each holder is added up, with earlier sums counting
less: so a long prompt says more of a rate than a short one, of which most is waiting.

A way from a holder is learned in two steps.
    1. Nobody waits for the first contact, in which two nodes may have to connect. It says only
       that something comes from there. How fast it was says nothing: it shares the GPU and the
       event loop with the prompt, and what it brings may have been computed meanwhile.
    2. From then on a prompt waits. As long as no rate was measured lately, the way is taken to be
       as fast as need be: a guess that is too slow would never be put right, one that is too fast
       costs one prompt at most `limit_seconds`.
A holder that failed is not asked again for a moment, and then nobody waits for the first contact.

What the holder has in host memory alone it must bring into its pool first. It alone knows how much
that is, and how fast: so it is told what a token may take there for the fetch still to be the
quicker way (`restore_seconds_per_token`), and gives what it can in that time.

Pure: time is an argument.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.node import NodeId

FIRST_TOKENS_PER_SECOND = 10_000.0
# Of a fetch beside moving: calls, a look at what is lacking, a reservation; and of a step what it
# takes for any number of tokens, which a prompt whose prefix was fetched needs as well. Between two
# H200s a first token came 11 ms later than one of a cached prompt for 2k tokens of an 8B model, 19
# for 8k.
FIXED_SECONDS = 0.010
# Of moving, for a single block between two GPUs.
LATENCY_SECONDS = 0.0015
REMEMBER_SECONDS = 120.0
AVOID_SECONDS = 30.0
MIN_LIMIT_SECONDS = 0.25
# Steps of fewer tokens take as long as the weights take to be read: they say nothing of a rate.
MIN_TOKENS_PER_STEP = 256
MAX_WAYS = 1024  # the latest; nodes come and go
_KEPT = 0.7  # of earlier sums, with each measurement


@dataclass(frozen=True, slots=True)
class Lacking:
    """Of what a holder has: tokens that no tier of ours has, and that a fetch saves us to compute;
    and tokens that our pool lacks, which it moves."""

    num_computed_tokens: int
    num_moved_tokens: int


@dataclass(frozen=True, slots=True)
class _Sums:
    """So many tokens took so long."""

    num_tokens: float
    seconds: float

    def seconds_of(self, num_tokens: int) -> float:
        return num_tokens * self.seconds / self.num_tokens

    def plus(self, num_tokens: int, seconds: float) -> _Sums:
        return _Sums(_KEPT * self.num_tokens + num_tokens, _KEPT * self.seconds + seconds)


_NOTHING = _Sums(0.0, 0.0)


@dataclass(frozen=True, slots=True)
class _Way:
    """From one holder to here."""

    is_reached: bool = False
    moved: _Sums = _NOTHING
    measured_at: float = 0.0

    def seconds_of(self, num_tokens: int, now: float) -> float:
        """At least that; 0 for whatever nobody has measured lately."""
        is_old = now - self.measured_at >= REMEMBER_SECONDS
        return 0.0 if is_old or self.moved is _NOTHING else self.moved.seconds_of(num_tokens)


class FetchEstimate:
    def __init__(self) -> None:
        self._computed = _NOTHING
        self._ways: dict[NodeId, _Way] = {}
        self._avoided_until: dict[NodeId, float] = {}

    def compute_seconds(self, num_tokens: int) -> float:
        if self._computed is _NOTHING:
            return num_tokens / FIRST_TOKENS_PER_SECOND
        return self._computed.seconds_of(num_tokens)

    def is_known(self, holder: NodeId) -> bool:
        """Whether something came from there, and nothing failed since."""
        return self._way(holder).is_reached

    def is_avoided(self, holder: NodeId, now: float) -> bool:
        """Whether it failed a moment ago."""
        return now < self._avoided_until.get(holder, 0.0)

    def limit_seconds(self, num_tokens: int) -> float:
        """How long a fetch may take before it is given up: it has then cost as much as computing
        and the same again."""
        return max(MIN_LIMIT_SECONDS, 2 * self.compute_seconds(num_tokens))

    def pays(self, holder: NodeId, lacking: Lacking, now: float) -> bool:
        """False for a way that is not known. Where this is false, it is for parts of it, too."""
        return self.is_known(holder) and self._spare_seconds(holder, lacking, now) > 0

    def restore_seconds_per_token(self, holder: NodeId, lacking: Lacking, now: float) -> float:
        """What each token may take until it is in the holder's pool."""
        spare = self._spare_seconds(holder, lacking, now)
        return max(0.0, spare) / max(1, lacking.num_moved_tokens)

    def _spare_seconds(self, holder: NodeId, lacking: Lacking, now: float) -> float:
        """By how much moving is sooner than computing."""
        moving = FIXED_SECONDS + self._way(holder).seconds_of(lacking.num_moved_tokens, now)
        return self.compute_seconds(lacking.num_computed_tokens) - moving

    def computed(self, num_tokens: int, num_steps: int, seconds: float) -> None:
        """So many tokens took the engine so many steps, and so long."""
        if num_steps > 0 and num_tokens >= MIN_TOKENS_PER_STEP * num_steps:
            self._computed = self._computed.plus(num_tokens, seconds)

    def reached(self, holder: NodeId) -> None:
        """Something came from there, for which nobody waited."""
        self._keep(holder, replace(self._way(holder), is_reached=True))

    def fetched(self, holder: NodeId, num_tokens: int, seconds: float, now: float) -> None:
        """So many tokens took so long on their way from there, or longer, and a prompt waited."""
        if num_tokens <= 0:
            return
        way = self._way(holder)
        is_old = now - way.measured_at >= REMEMBER_SECONDS
        moving = max(0.0, seconds - LATENCY_SECONDS)
        moved = (_NOTHING if is_old else way.moved).plus(num_tokens, moving)
        self._keep(holder, _Way(way.is_reached, moved, now))

    def failed(self, holder: NodeId, now: float) -> None:
        """What was measured stays: it may have failed by being slow."""
        self._keep(holder, replace(self._way(holder), is_reached=False))
        for node, until in list(self._avoided_until.items()):
            if until <= now:
                del self._avoided_until[node]
        self._avoided_until[holder] = now + AVOID_SECONDS

    def _way(self, holder: NodeId) -> _Way:
        return self._ways.get(holder, _Way())

    def _keep(self, holder: NodeId, way: _Way) -> None:
        self._ways.pop(holder, None)
        self._ways[holder] = way
        if len(self._ways) > MAX_WAYS:
            del self._ways[next(iter(self._ways))]
