"""A measurement for people and for programs.

The table is, row by row, that of `vllm bench serve`, so one eye and one script read both. What
it has no row for (errors by class, cached tokens, a client at its limit) follows below it.
The JSON has the same program's keys, then ours.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import ConfigError
from cluster.logging import plain, redact
from cluster.options import options_of
from loadtest.config import BenchConfig

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from loadtest.metadata import RunMetadata
    from loadtest.record import RequestRecord
    from loadtest.statistics import Distribution, Summary

MAX_NAME_BYTES = 80  # of each part of a file's name
WIDTH = 50
SCHEMA_VERSION = 1
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


@dataclass(frozen=True, slots=True)
class Cut:
    """Requests of a measurement that was ended early, which count nowhere else."""

    num_running: int
    num_unsent: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """`client_cpu` is the processor time of this process as a share of the duration. `cut` is None
    when every request has ended."""

    config: BenchConfig
    model: str
    started: datetime
    summary: Summary
    records: Sequence[RequestRecord]
    client_cpu: float
    metadata: RunMetadata
    cut: Cut | None = None


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


def to_json(result: BenchResult) -> dict[str, Any]:
    """JSON-ready. Keys that end in _ms are milliseconds; all other times are seconds."""
    config, summary = result.config, result.summary
    rate = config.requests_per_second
    document: dict[str, Any] = {
        "date": result.started.strftime("%Y%m%d-%H%M%S"),
        "backend": config.backend,
        "label": config.label,
        "model_id": result.model,
        "tokenizer_id": config.tokenizer,
        "num_prompts": config.num_prompts,
        "request_rate": rate if math.isfinite(rate) else "inf",
        "burstiness": config.burstiness if math.isfinite(config.burstiness) else "inf",
        "max_concurrency": config.max_concurrency,
        "duration": summary.duration,
        "completed": summary.completed,
        "failed": summary.failed,
        "total_input_tokens": summary.total_input_tokens,
        "total_output_tokens": summary.total_output_tokens,
        "request_throughput": summary.request_throughput,
        "request_goodput": summary.request_goodput,
        "output_throughput": summary.output_throughput,
        "total_token_throughput": summary.total_token_throughput,
        "max_output_tokens_per_s": summary.peak_output_throughput,
        "max_concurrent_requests": summary.peak_concurrency,
    }
    for name, distribution in summary.latencies.items():
        document |= _latency_keys(name, distribution)
    document |= _own_keys(result)
    if config.save_detailed:
        document |= _detailed_keys(result.records)
    return document


def result_path(result: BenchResult) -> Path:
    config = result.config
    if config.result_filename is not None:
        return Path(config.result_dir) / config.result_filename
    rate = config.requests_per_second
    limit = "" if config.max_concurrency is None else f"-concurrency{config.max_concurrency}"
    name = "-".join(
        (
            _in_name(config.label or config.backend),
            f"{rate:g}qps{limit}",
            _in_name(result.model.rstrip("/").rpartition("/")[2]),
            result.started.strftime("%Y%m%d-%H%M%S"),
        )
    )
    return Path(config.result_dir) / f"{name}.json"


def _in_name(text: str) -> str:
    """Of a file: no folder, and not too long for a file system."""
    return plain(text).replace("/", "-").encode()[:MAX_NAME_BYTES].decode(errors="ignore")


def make_folder(config: BenchConfig) -> None:
    """Before anything is measured. Raises `ConfigError` where the result could not be written."""
    folder = at = Path(config.result_dir)
    if config.result_filename is not None:
        at = folder / config.result_filename
        folder = at.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        if config.result_filename is not None:
            _check_file(at)
    except OSError as error:
        raise ConfigError(f"nothing can be written into {at}: {error.strerror}.") from error


def _check_file(path: Path) -> None:
    """Raises `OSError` where it could not be written; leaves it as it is."""
    is_new = not path.exists()
    with path.open("a"):
        pass
    if is_new:
        path.unlink()


def save(result: BenchResult) -> Path:
    """Raises `ConfigError` where it cannot be written after all."""
    path = result_path(result)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(to_json(result), indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"the result is not in {path}: {error.strerror}.") from error
    return path


def percentile_name(percentile: float) -> str:
    """99.0 -> "99", 99.9 -> "99.9"."""
    return f"{percentile:g}"


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


def _latency_keys(name: str, distribution: Distribution) -> dict[str, float]:
    keys = {
        f"{part}_{name}_ms": getattr(distribution, part) * 1e3
        for part in ("mean", "median", "std", "min", "max")
    }
    for percentile, value in distribution.percentiles.items():
        keys[f"p{percentile_name(percentile)}_{name}_ms"] = value * 1e3
    return keys


def _own_keys(result: BenchResult) -> dict[str, Any]:
    summary = result.summary
    options = {
        each.name: getattr(result.config, each.name)
        for each in options_of(BenchConfig)
        if not each.secret
    }
    if math.isinf(result.config.burstiness):
        options["burstiness"] = "inf"
    options["base_url"] = redact(result.config.base_url)
    return {
        "schema_version": SCHEMA_VERSION,
        "slo_attainment": summary.slo_attainment,
        "total_cached_tokens": summary.total_cached_tokens,
        "tokens_per_chunk": summary.tokens_per_chunk,
        "num_answers_without_usage": summary.num_uncounted,
        "errors_by_class": dict(summary.failures_by_class),
        "client_cpu": result.client_cpu,
        "cut": None if result.cut is None else asdict(result.cut),
        "options": options,
        "metadata": result.metadata.as_dict(),
    }


def _detailed_keys(records: Sequence[RequestRecord]) -> dict[str, Any]:
    """One entry per request, in order; a failed one has zeros where it was not measured."""
    return {
        "input_lens": [r.num_input_tokens for r in records],
        "output_lens": [r.num_output_tokens for r in records],
        "ttfts": [r.time_to_first_token if r.chunk_times else 0.0 for r in records],
        "itls": [r.gaps for r in records],
        "latencies": [r.latency if r.chunk_times else 0.0 for r in records],
        "start_times": [r.sent for r in records],
        "planned_times": [r.planned for r in records],
        "errors": ["" if r.failure is None else r.failure.error_class for r in records],
    }
