"""An engine in the Prometheus format, read from live counts when scraped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from cluster.node import NodeLoad
    from engine.loop import LoopStats


class EngineCollector(Collector):
    """`load` gives the same numbers that heartbeats carry, so both always agree.

    `choices`: what the engine decided at start, by label.
    """

    def __init__(
        self,
        load: Callable[[], NodeLoad],
        stats: LoopStats,
        choices: Mapping[str, str] | None = None,
    ) -> None:
        self._load = load
        self._stats = stats
        self._choices = dict(choices or {})

    def collect(self) -> Iterator[Metric]:
        load, stats = self._load(), self._stats
        blocks = GaugeMetricFamily("baton_kv_blocks", "KV blocks by state.", labels=["state"])
        blocks.add_metric(["free"], load.num_free_blocks - load.num_cached_blocks)
        blocks.add_metric(["cached"], load.num_cached_blocks)
        num_used = load.num_blocks - load.num_free_blocks - load.num_quarantined_blocks
        blocks.add_metric(["used"], max(0, num_used))  # the two counts are a moment apart
        blocks.add_metric(["quarantined"], load.num_quarantined_blocks)
        yield blocks
        if self._choices:
            info = GaugeMetricFamily(
                "baton_engine_info",
                "1, with what the engine decided at start.",
                labels=list(self._choices),
            )
            info.add_metric(list(self._choices.values()), 1)
            yield info
        gauges: tuple[tuple[str, str, float], ...] = (
            ("baton_sequences_running", "Sequences that run.", load.num_running),
            ("baton_sequences_waiting", "Sequences that wait.", load.num_waiting),
            ("baton_queued_tokens", "Tokens still to be computed.", load.queued_tokens),
            ("baton_kv_transfers_in_flight", "Transfers in flight.", load.num_transfers),
        )
        for name, text, value in gauges:
            yield GaugeMetricFamily(name, text, value=value)
        counters: tuple[tuple[str, str, float], ...] = (
            ("baton_engine_steps", "Steps run.", stats.num_steps),
            ("baton_engine_step_seconds", "Time inside steps.", stats.step_seconds),
            ("baton_engine_failed_steps", "Steps that raised.", stats.num_failed_steps),
            ("baton_computed_tokens", "Tokens computed.", stats.num_computed_tokens),
            ("baton_sampled_tokens", "Tokens drawn.", stats.num_sampled_tokens),
            ("baton_cached_tokens", "Prompt tokens found in the cache.", stats.num_cached_tokens),
            ("baton_preemptions", "Sequences that lost their blocks.", stats.num_preemptions),
        )
        for name, text, value in counters:
            yield CounterMetricFamily(name, text, value=value)
