"""Two saved results beside each other: what changed, and whether they measured the same thing.

A ratio is the second over the first; whether more is better the name of the row says.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from cluster.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Json = dict[str, Any]
_COUNTS = ("completed", "failed")
_RATES = ("request_throughput", "request_goodput", "output_throughput", "total_token_throughput")
_PARTS = ("mean", "median", "p90", "p99")
_METRICS = ("ttft", "tpot", "itl", "e2el")
# What may differ without making two runs incomparable.
_INCIDENTAL = frozenset({"base_url", "label", "result_dir", "result_filename", "save_detailed"})


def read_result(path: Path) -> Json:
    """Raises `ConfigError` for what `baton bench run --save-result` did not write."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(result, dict) or "schema_version" not in result:
        raise ConfigError(f"{path} is no result of `baton bench run --save-result`.")
    return result


def render_comparison(first: Json, second: Json) -> str:
    rows = [("", first.get("label") or "first", second.get("label") or "second", "ratio")]
    rows += [_row(name, first[name], second[name]) for name in _names(first, second)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3))]).rstrip()
        for row in rows
    ]
    return "\n".join(lines + [f"Different: {text}" for text in _differences(first, second)])


def _names(first: Json, second: Json) -> Iterator[str]:
    latencies = (f"{part}_{metric}_ms" for metric in _METRICS for part in _PARTS)
    for name in (*_COUNTS, *_RATES, *latencies):
        if first.get(name) is not None and second.get(name) is not None:
            yield name


def _row(name: str, first: float, second: float) -> tuple[str, str, str, str]:
    if name in _COUNTS:
        return name, str(first), str(second), ""
    ratio = f"{second / first:.3f}x" if first else ""
    return name, f"{first:.2f}", f"{second:.2f}", ratio


def _differences(first: Json, second: Json) -> Iterator[str]:
    if first.get("model_id") != second.get("model_id"):
        yield f"model {first.get('model_id')} and {second.get('model_id')}"
    one, other = first.get("options", {}), second.get("options", {})
    for name in sorted((one.keys() | other.keys()) - _INCIDENTAL):
        if one.get(name) != other.get(name):
            yield f"--{name.replace('_', '-')} {one.get(name)} and {other.get(name)}"
