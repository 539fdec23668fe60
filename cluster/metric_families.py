"""Families of the Prometheus format from values at hand, for collectors over live counters.

A scrape runs on a thread of its own: tables that another one may extend meanwhile are copied first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from prometheus_client.core import Metric

    # The value of the only label, or those of all.
    Key = TypeVar("Key", bound=str | tuple[str, ...])

Family = TypeVar("Family", CounterMetricFamily, GaugeMetricFamily)


def counter_by(
    labels: Sequence[str], name: str, text: str, values: Mapping[Key, float]
) -> CounterMetricFamily:
    """One sample for each key, in their order."""
    return _filled(CounterMetricFamily(name, text, labels=labels), values)


def gauge_by(
    labels: Sequence[str], name: str, text: str, values: Mapping[Key, float]
) -> GaugeMetricFamily:
    """One sample for each key, in their order."""
    return _filled(GaugeMetricFamily(name, text, labels=labels), values)


def counters(rows: Iterable[tuple[str, str, float]]) -> Iterator[Metric]:
    """Without labels: name, text and value of each."""
    for name, text, value in rows:
        yield CounterMetricFamily(name, text, value=value)


def gauges(rows: Iterable[tuple[str, str, float]]) -> Iterator[Metric]:
    """Without labels: name, text and value of each."""
    for name, text, value in rows:
        yield GaugeMetricFamily(name, text, value=value)


def _filled(family: Family, values: Mapping[Key, float]) -> Family:
    for key, value in list(values.items()):
        family.add_metric([key] if isinstance(key, str) else list(key), value)
    return family
