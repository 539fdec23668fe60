"""Live counts of the gateway, cheap enough for every token.

Hot paths add to plain numbers here; `metrics.py` turns them into the Prometheus format when
somebody asks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from typing import TYPE_CHECKING

from cluster.metrics import (
    INTER_TOKEN_BUCKETS,
    INTERNAL_SECONDS_BUCKETS,
    REQUEST_SECONDS_BUCKETS,
    TIME_TO_FIRST_TOKEN_BUCKETS,
    token_count_buckets,
)
from gateway.lost_clients import CLIENT_GONE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.errors import ServingError

# Seconds. Gaps of a fast decode step are far below the smallest bound that vLLM has.
GAP_BUCKETS = (
    *(0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008),
    *(0.01, 0.0125, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0),
)
MAX_COUNTED_TOKENS = 200_000


class Distribution:
    """Observations counted between ascending bounds, as a Prometheus histogram counts them."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def num_observed(self) -> int:
        return sum(self.counts)


class Measures:
    """What this gateway has seen since it started. Durations are in seconds."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()  # by route and HTTP status
        self.errors: Counter[tuple[str, str]] = Counter()  # requests by code and reason
        self.endings: Counter[str] = Counter()  # sequences by finish reason
        self.rejections: Counter[str] = Counter()  # by admission's reason
        self.retries: Counter[tuple[str, str]] = Counter()  # by kind and the error's reason
        self.pair_holds: Counter[str] = Counter()  # by the last failure's reason
        self.num_pairs_held_back = 0  # or tried again, and not known to work
        self.num_disconnected = 0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self.num_generated_tokens = 0
        self.num_waiting = 0  # sequences without a first token
        self.num_running = 0  # sequences with one
        tokens = token_count_buckets(MAX_COUNTED_TOKENS)
        self.time_to_first_token = Distribution(TIME_TO_FIRST_TOKEN_BUCKETS)
        self.inter_token_latency = Distribution(GAP_BUCKETS)
        self.coarse_inter_token_latency = Distribution(INTER_TOKEN_BUCKETS)
        self.time_per_output_token = Distribution(GAP_BUCKETS)
        self.coarse_time_per_output_token = Distribution(INTER_TOKEN_BUCKETS)
        self.request_latency = Distribution(REQUEST_SECONDS_BUCKETS)
        self.handoff_gap = Distribution(GAP_BUCKETS)
        self.routing_decision = Distribution(INTERNAL_SECONDS_BUCKETS)
        self.prompt_tokens = Distribution(tokens)
        self.generation_tokens = Distribution(tokens)

    def request_ended(self, route: str, status: int, error: ServingError | None) -> None:
        """Its client has an answer: all of it, or one error; or has left."""
        self.requests[route, status] += 1
        if error is not None:
            self.errors[error.code, error.reason or ""] += 1
            self.num_disconnected += error.reason == CLIENT_GONE

    def gap(self, seconds: float) -> None:
        """Between two deliveries of one sequence."""
        self.inter_token_latency.observe(seconds)
        self.coarse_inter_token_latency.observe(seconds)

    def output_token_time(self, seconds: float) -> None:
        """(last - first) / (n - 1) of one sequence."""
        self.time_per_output_token.observe(seconds)
        self.coarse_time_per_output_token.observe(seconds)
