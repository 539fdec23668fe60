"""What a prefill node fetches from others and gives away, in the Prometheus format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.metric_families import counter_by

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prefill_node.prefix_fetches import FetchStats


class FetchCollector(Collector):
    def __init__(self, stats: FetchStats) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats
        yield counter_by(
            ["outcome"],
            "baton_prefix_fetches",
            "Prompts of which another node had more: their prefix was waited for and came, "
            "nobody waited for it, it was not worthwhile, or it failed. All but the first were "
            "computed.",
            {
                "waited": stats.num_waited,
                "explored": stats.num_explored,
                "not_worthwhile": stats.num_not_worthwhile,
                "failed": stats.num_failed,
            },
        )
        yield CounterMetricFamily(
            "baton_prefix_fetched_tokens",
            "Prompt tokens whose KV came from another node's cache instead of being computed.",
            value=stats.num_tokens,
        )
        yield CounterMetricFamily(
            "baton_prefix_fetch_wait_seconds",
            "Time that prompts waited for fetches, whether these came or failed.",
            value=stats.waited_seconds,
        )
