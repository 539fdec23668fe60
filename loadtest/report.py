"""A measurement for people.

The table is, row by row, that of `vllm bench serve`, so one eye and one script read both. What
it has no row for (errors by class, cached tokens, a client at its limit) follows below it.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from cluster.logging import plain
from loadtest.statistics import percentile_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loadtest.config import BenchConfig
    from loadtest.result import BenchResult, Cut
    from loadtest.statistics import Distribution, Summary

WIDTH = 50
MAX_ERRORS_SHOWN = 10
# Above it the client itself may be what limits the rate.
BUSY_CLIENT_CPU = 0.9
LATE_SCHEDULE_SECONDS = 0.1

_HEADINGS = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
}


def render_table(result: BenchResult) -> str:
    config, summary = result.config, result.summary
    lines = [" Serving Benchmark Result ".center(WIDTH, "=")]
    lines += _count_rows(config, summary)
    for name in _HEADINGS:
        if name in config.selected_metrics and summary.completed:
            lines += _latency_rows(name, summary.latencies[name], config.percentiles)
    lines.append("=" * WIDTH)
    return "\n".join(lines)


def render_notes(result: BenchResult) -> str:
    """What the reader must know beside the table; empty when there is nothing."""
    summary = result.summary
    lines = [] if result.cut is None else [_cut_note(result.cut, summary)]
    lines += [f"Errors: {count} x {name}" for name, count in summary.failures_by_class.items()]
    messages = Counter(record.failure.message for record in result.records if record.failure)
    lines += [
        f"  {message}" + (f" ({count} times)" if count > 1 else "")
        for message, count in messages.most_common(MAX_ERRORS_SHOWN)
    ]
    if summary.total_cached_tokens:
        share = summary.total_cached_tokens / max(1, summary.total_input_tokens)
        lines.append(f"Cached prompt tokens: {summary.total_cached_tokens} ({share:.1%})")
    if summary.num_uncounted:
        lines.append(
            f"Warning: {summary.num_uncounted} answers had no usage; each chunk was counted as "
            "one token. Pass --tokenizer to count them."
        )
    if result.client_cpu > BUSY_CLIENT_CPU and summary.completed:
        lines.append(
            f"Warning: the load client used {result.client_cpu:.0%} of a core; it may be what "
            "limits this result."
        )
    late = summary.latencies["schedule_delay"].percentiles[99.0]
    if math.isfinite(result.config.requests_per_second) and late > LATE_SCHEDULE_SECONDS:
        lines.append(f"Warning: p99 of requests left {late * 1e3:.0f} ms after their planned time.")
    return plain("\n".join(lines))  # a server may say anything


def _cut_note(cut: Cut, summary: Summary) -> str:
    num_ended = summary.completed + summary.failed
    return (
        f"Cut short after {summary.duration:.1f} s: {num_ended} requests had ended and count, "
        f"{cut.num_running} were running, {cut.num_unsent} not sent yet."
    )


def _count_rows(config: BenchConfig, summary: Summary) -> list[str]:
    rows = [_count("Successful requests:", summary.completed)]
    rows.append(_count("Failed requests:", summary.failed))
    if config.max_concurrency is not None:
        rows.append(_count("Maximum request concurrency:", config.max_concurrency))
    if math.isfinite(config.requests_per_second):
        rows.append(_figure("Request rate configured (RPS):", config.requests_per_second))
    rows += [
        _figure("Benchmark duration (s):", summary.duration),
        _count("Total input tokens:", summary.total_input_tokens),
        _count("Total generated tokens:", summary.total_output_tokens),
        _figure("Request throughput (req/s):", summary.request_throughput),
    ]
    if summary.request_goodput is not None:
        rows.append(_figure("Request goodput (req/s):", summary.request_goodput))
    rows += [
        _figure("Output token throughput (tok/s):", summary.output_throughput),
        _figure("Peak output token throughput (tok/s):", summary.peak_output_throughput),
        _figure("Peak concurrent requests:", summary.peak_concurrency),
        _figure("Total token throughput (tok/s):", summary.total_token_throughput),
    ]
    return rows


def _latency_rows(name: str, distribution: Distribution, percentiles: Sequence[float]) -> list[str]:
    short, heading = _HEADINGS[name]
    rows = [heading.center(WIDTH, "-")]
    rows.append(_figure(f"Mean {short} (ms):", distribution.mean * 1e3))
    rows.append(_figure(f"Median {short} (ms):", distribution.median * 1e3))
    rows += [
        _figure(f"P{percentile_name(p)} {short} (ms):", distribution.percentiles[p] * 1e3)
        for p in percentiles
    ]
    return rows


def _count(name: str, value: int) -> str:
    return f"{name:<40} {value:<10}"


def _figure(name: str, value: float) -> str:
    return f"{name:<40} {value:<10.2f}"
