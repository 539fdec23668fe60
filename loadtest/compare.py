"""Two saved results beside each other: what changed, and whether they measured the same thing.

Rows have the names of the table of a run. A ratio is the second over the first; whether more is
better the name of the row says.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TypeGuard

from cluster.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

Json = dict[str, Any]
Row = tuple[str, str, str, str]
_COUNTS = {"completed": "Successful requests", "failed": "Failed requests"}
_RATES = {
    "request_throughput": "Request throughput (req/s)",
    "request_goodput": "Request goodput (req/s)",
    "output_throughput": "Output token throughput (tok/s)",
    "total_token_throughput": "Total token throughput (tok/s)",
}
_TOKENS = ("total_cached_tokens", "total_input_tokens")
_PARTS = {"mean": "Mean", "median": "Median", "p90": "P90", "p99": "P99"}
_METRICS = ("ttft", "tpot", "itl", "e2el")
_LATENCIES = {
    f"{part}_{metric}_ms": f"{word} {metric.upper()} (ms)"
    for metric in _METRICS
    for part, word in _PARTS.items()
}
# What may differ without making two runs incomparable: where it ran, what was shown and kept.
_INCIDENTAL = frozenset(
    {
        "base_url",
        "label",
        "metric_percentiles",
        "percentile_metrics",
        "result_dir",
        "result_filename",
        "save_detailed",
        "save_result",
    }
)
# Of the prompt tokens, beyond which one run is told to have found more cached than the other.
_CACHED_SHARE = 0.05


def read_result(path: Path) -> Json:
    """Raises `ConfigError` for what `baton bench run --save-result` did not write."""
    try:
        result = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON.") from error
    if not _is_result(result):
        raise ConfigError(f"{path} is no result of `baton bench run --save-result`.")
    return result


def _is_result(document: Any) -> TypeGuard[Json]:
    """Whether it is of the types that are computed with below."""
    if not isinstance(document, dict) or "schema_version" not in document:
        return False
    figures = [document.get(name) or 0 for name in (*_COUNTS, *_RATES, *_LATENCIES, *_TOKENS)]
    has_figures = all(isinstance(figure, (int, float)) for figure in figures)
    return has_figures and isinstance(document.get("options", {}), dict)


def render_comparison(first: Json, second: Json, *, markdown: bool = False) -> str:
    """`markdown`: as a table of a report."""
    one, other = str(first.get("label") or "first"), str(second.get("label") or "second")
    rows: list[Row] = [("", one, other, "ratio")]
    rows += [_row(name, first[name], second[name]) for name in _names(first, second)]
    remarks = [f"Different: {text}" for text in _differences(first, second)]
    if not markdown:
        return "\n".join([*_aligned(rows), *remarks])
    lines = [f"| {' | '.join(_escaped(cell) for cell in row)} |" for row in rows]
    lines.insert(1, "|---|---:|---:|---:|")
    return "\n".join(lines + [f"\n{remark}" for remark in remarks])


def _aligned(rows: Sequence[Row]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        numbers = [row[column].rjust(widths[column]) for column in (1, 2, 3)]
        yield "  ".join([row[0].ljust(widths[0]), *numbers]).rstrip()


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")


def _names(first: Json, second: Json) -> Iterator[str]:
    for name in (*_COUNTS, *_RATES, *_LATENCIES):
        if first.get(name) is not None and second.get(name) is not None:
            yield name


def _row(name: str, first: float, second: float) -> Row:
    if name in _COUNTS:
        return _COUNTS[name], str(first), str(second), ""
    ratio = f"{second / first:.3f}x" if first else ""
    heading = _RATES.get(name) or _LATENCIES[name]
    return heading, f"{first:.2f}", f"{second:.2f}", ratio


def _differences(first: Json, second: Json) -> Iterator[str]:
    if first.get("model_id") != second.get("model_id"):
        yield f"model {first.get('model_id')} and {second.get('model_id')}"
    for order, result in (("first", first), ("second", second)):
        if result.get("cut"):
            yield f"the {order} was cut short, its last requests are missing"
    one, other = first.get("options", {}), second.get("options", {})
    for name in sorted((one.keys() | other.keys()) - _INCIDENTAL):
        values = one.get(name), other.get(name)
        if values[0] != values[1]:
            flag = f"--{name.replace('_', '-')}"
            yield f"{flag} {_shown(values[0])} and {_shown(values[1])}"
    cached = _cached_share(first), _cached_share(second)
    if abs(cached[0] - cached[1]) > _CACHED_SHARE:
        yield f"{cached[0]:.0%} and {cached[1]:.0%} of the prompt tokens were cached"


def _shown(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "none" if value in (None, "") else str(value)


def _cached_share(result: Json) -> float:
    cached = result.get("total_cached_tokens") or 0
    return float(cached) / max(1, result.get("total_input_tokens") or 0)
