"""Records in, figures out. Pure: the same records give the same figures.

Definitions (n tokens; t_p planned, t_s sent, t_k the k-th chunk with content; D measured time)
    TTFT    t_1 - t_s                       corrected for coordinated omission: t_1 - t_p
    TTST    t_2 - t_1
    ITL     every t_(k+1) - t_k of every request, pooled
    E2EL    t_last - t_s
    TPOT    (E2EL - TTFT) / (n - 1); a request with n <= 1 has none, and counts as 0 for goodput
    NTPOT   E2EL / n
    delay   t_s - t_p
Throughputs divide by D. Only requests that succeeded count, except in `failed` and attainment.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from loadtest.record import RequestRecord

ALWAYS_KEPT_PERCENTILES = (25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.9)


@dataclass(frozen=True, slots=True)
class Distribution:
    """Seconds, or plain numbers for ratios. All 0 when there was nothing to measure."""

    count: int
    mean: float
    median: float
    std: float
    min: float
    max: float
    percentiles: Mapping[float, float]


def percentile_name(percentile: float) -> str:
    """99.0 -> "99", 99.9 -> "99.9"."""
    return f"{percentile:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """`request_goodput` and `slo_attainment` are None when no limits were given.

    `peak_output_throughput` is the best second; `peak_concurrency` the most requests in flight
    at one instant. `latencies` are the distributions by the short names above.
    """

    duration: float
    completed: int
    failed: int
    failures_by_class: Mapping[str, int]
    total_input_tokens: int
    total_output_tokens: int
    total_cached_tokens: int
    num_uncounted: int  # requests whose tokens were taken to be their chunks
    request_throughput: float
    output_throughput: float
    total_token_throughput: float
    peak_output_throughput: float
    peak_concurrency: int
    tokens_per_chunk: float
    request_goodput: float | None
    slo_attainment: float | None
    latencies: Mapping[str, Distribution]


def summarise(
    records: Sequence[RequestRecord],
    duration: float,
    *,
    percentiles: Sequence[float],
    slo_seconds: Mapping[str, float],
) -> Summary:
    """`duration` in seconds, more than 0."""
    good = [record for record in records if record.succeeded]
    num_input = sum(record.num_input_tokens for record in good)
    num_output = sum(record.num_output_tokens for record in good)
    num_chunks = sum(len(record.chunk_times) for record in good)
    num_within = sum(is_within(record, slo_seconds) for record in good)
    return Summary(
        duration=duration,
        completed=len(good),
        failed=len(records) - len(good),
        failures_by_class=_failures_by_class(records),
        total_input_tokens=num_input,
        total_output_tokens=num_output,
        total_cached_tokens=sum(record.num_cached_tokens for record in good),
        num_uncounted=sum(record.counted_by == "chunks" for record in good),
        request_throughput=len(good) / duration,
        output_throughput=num_output / duration,
        total_token_throughput=(num_input + num_output) / duration,
        peak_output_throughput=peak_tokens_per_second(good),
        peak_concurrency=peak_concurrency(good),
        tokens_per_chunk=num_output / num_chunks if num_chunks else 0.0,
        request_goodput=num_within / duration if slo_seconds else None,
        slo_attainment=num_within / len(records) if slo_seconds and records else None,
        latencies=_latencies(good, sorted({*percentiles, *ALWAYS_KEPT_PERCENTILES})),
    )


def is_within(record: RequestRecord, slo_seconds: Mapping[str, float]) -> bool:
    """Whether a request that succeeded met every limit."""
    measured = {
        "ttft": record.time_to_first_token,
        "tpot": record.time_per_output_token or 0.0,
        "e2el": record.latency,
    }
    return all(measured[name] <= limit for name, limit in slo_seconds.items())


def describe(values: Iterable[float], percentiles: Sequence[float]) -> Distribution:
    """Percentiles interpolate linearly; the standard deviation is the population's."""
    array = np.fromiter(values, dtype=np.float64)
    if array.size == 0:
        return Distribution(0, 0.0, 0.0, 0.0, 0.0, 0.0, dict.fromkeys(percentiles, 0.0))
    found = np.percentile(array, list(percentiles))
    return Distribution(
        count=int(array.size),
        mean=float(array.mean()),
        median=float(np.median(array)),
        std=float(array.std()),
        min=float(array.min()),
        max=float(array.max()),
        percentiles={p: float(value) for p, value in zip(percentiles, found, strict=True)},
    )


def peak_tokens_per_second(records: Sequence[RequestRecord]) -> float:
    """Most tokens in any second since the first request. A request's chunks share its tokens."""
    if not records:
        return 0.0
    start = min(record.sent for record in records)
    seconds = [int(time - start) for record in records for time in record.chunk_times]
    weights = [
        record.num_output_tokens / len(record.chunk_times)
        for record in records
        for _ in record.chunk_times
    ]
    return float(np.bincount(seconds, weights=weights).max())


def peak_concurrency(records: Sequence[RequestRecord]) -> int:
    """Most requests in flight at one instant, each from sent up to, not including, its last."""
    changes = [(record.sent, 1) for record in records]
    changes += [(record.chunk_times[-1], -1) for record in records]
    in_flight = most = 0
    for _, change in sorted(changes):  # an end sorts before a start at the same instant
        in_flight += change
        most = max(most, in_flight)
    return most


def _failures_by_class(records: Sequence[RequestRecord]) -> dict[str, int]:
    classes = Counter(r.failure.error_class for r in records if r.failure is not None)
    return dict(classes.most_common())


def _latencies(
    good: Sequence[RequestRecord], percentiles: Sequence[float]
) -> dict[str, Distribution]:
    several = [record for record in good if len(record.chunk_times) > 1]
    values: dict[str, list[float]] = {
        "ttft": [record.time_to_first_token for record in good],
        "tpot": [tpot for r in good if (tpot := r.time_per_output_token) is not None],
        "itl": [gap for record in good for gap in record.gaps],
        "e2el": [record.latency for record in good],
        "ttst": [record.chunk_times[1] - record.chunk_times[0] for record in several],
        "ntpot": [record.latency / record.num_output_tokens for record in good],
        "corrected_ttft": [record.chunk_times[0] - record.planned for record in good],
        "schedule_delay": [record.sent - record.planned for record in good],
    }
    return {name: describe(found, percentiles) for name, found in values.items()}
