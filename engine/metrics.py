"""An engine in the Prometheus format, read from live counts when scraped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.facts import engine_choices

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from cluster.node import NodeLoad
    from engine.engine import Engine
    from engine.host_blocks import HostBlocks
    from engine.host_copier import HostCopier
    from engine.loop import LoopStats


def engine_collectors(
    engine: Engine, load: Callable[[], NodeLoad], stats: LoopStats
) -> list[Collector]:
    """All that a node exports of its engine."""
    host, copier = engine.block_manager.host, engine.copier
    collectors: list[Collector] = [EngineCollector(load, stats, engine_choices(engine), host)]
    if host is not None and copier is not None:
        collectors.append(HostTierCollector(host, copier))
    return collectors


class EngineCollector(Collector):
    """`load` gives the same numbers that heartbeats carry, so both always agree.

    `choices`: what the engine decided at start, by label. `host`: of the tier below its pool.
    """

    def __init__(
        self,
        load: Callable[[], NodeLoad],
        stats: LoopStats,
        choices: Mapping[str, str] | None = None,
        host: HostBlocks | None = None,
    ) -> None:
        self._load = load
        self._stats = stats
        self._choices = dict(choices or {})
        self._host = host

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
        yield self._prefix_hits()
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

    def _prefix_hits(self) -> Metric:
        """The tiers are counted a moment apart: from the load on, and with the first token."""
        hits = CounterMetricFamily(
            "baton_prefix_hit_tokens",
            "Prompt tokens found in the cache, by the tier that had them.",
            labels=["tier"],
        )
        num_host_tokens = 0 if self._host is None else self._host.stats.num_hit_tokens
        hits.add_metric(["device"], max(0, self._stats.num_cached_tokens - num_host_tokens))
        hits.add_metric(["host"], num_host_tokens)
        return hits


class HostTierCollector(Collector):
    """The memory below the pool, and the copies to and from it."""

    def __init__(self, host: HostBlocks, copier: HostCopier) -> None:
        self._host = host
        self._copier = copier

    def collect(self) -> Iterator[Metric]:
        tier, stats = self._host.tier, self._host.stats
        blocks = GaugeMetricFamily(
            "baton_host_kv_blocks", "KV blocks of host memory by state.", labels=["state"]
        )
        num_moving, num_available = tier.num_moving, tier.num_available
        num_cached = min(tier.num_ready, num_available)  # the counts are a moment apart
        blocks.add_metric(["free"], num_available - num_cached)
        blocks.add_metric(["cached"], num_cached)
        blocks.add_metric(["moving"], num_moving)
        yield blocks
        names = (("bytes", "Bytes of KV copied to (save) and from (load) host memory."),
                 ("seconds", "Time that copies took, from their turn to their end."))  # fmt: skip
        for name, text in names:
            copied = CounterMetricFamily(f"baton_host_kv_{name}", text, labels=["direction"])
            for kind, done in self._copier.stats.items():
                value = done.num_bytes if name == "bytes" else done.seconds
                copied.add_metric([kind.value], value)
            yield copied
        failures = CounterMetricFamily(
            "baton_host_kv_failures",
            "Blocks that came back with another digest, copies that failed.",
            labels=["reason"],
        )
        failures.add_metric(["digest"], stats.num_bad_blocks)
        failures.add_metric(["copy"], stats.num_failed_copies)
        yield failures
        yield CounterMetricFamily(
            "baton_host_kv_lost_blocks",
            "Cached blocks that were evicted before they were saved.",
            value=stats.num_lost_blocks,
        )
