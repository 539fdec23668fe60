"""A measurement for programs: a JSON file, and the folder where it is found again.

It has the keys of `vllm bench serve`, then ours.
"""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import ConfigError
from cluster.logging import plain, redact
from cluster.options import options_of
from loadtest.config import BenchConfig
from loadtest.statistics import percentile_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loadtest.record import RequestRecord
    from loadtest.result import BenchResult
    from loadtest.statistics import Distribution

MAX_NAME_BYTES = 80  # of each part of a file's name
SCHEMA_VERSION = 1


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
    return (
        plain(text)
        .replace("/", "-")
        .encode(errors="replace")[:MAX_NAME_BYTES]
        .decode(errors="ignore")
    )


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


def to_json(result: BenchResult) -> dict[str, Any]:
    """JSON-ready. Keys that end in _ms are milliseconds; all other times are seconds."""
    config, summary = result.config, result.summary
    document: dict[str, Any] = {
        "date": result.started.strftime("%Y%m%d-%H%M%S"),
        "backend": config.backend,
        "label": config.label,
        "model_id": result.model,
        "tokenizer_id": config.tokenizer,
        "num_prompts": config.num_prompts,
        "request_rate": _number(config.requests_per_second),
        "burstiness": _number(config.gap_shape),
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


def _number(value: float) -> float | str:
    """JSON has no infinity."""
    return value if math.isfinite(value) else "inf"


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
    options["burstiness"] = _number(result.config.gap_shape)
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
