"""An engine in the Prometheus format, read from live counts when scraped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.metric_families import counter_by, counters, gauge_by, gauges
from engine.facts import engine_choices

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from cluster.node import NodeLoad
    from engine.block_manager import BlockManager
    from engine.engine import Engine
    from engine.host_blocks import HostBlocks
    from engine.host_copier import HostCopier
    from engine.loop_parts import LoopStats
    from engine.restores import RestoreStats


def engine_collectors(
    engine: Engine, load: Callable[[], NodeLoad], stats: LoopStats
) -> list[Collector]:
    """All that a node exports of its engine."""
    manager, copier = engine.block_manager, engine.copier
    host = manager.host
    collectors: list[Collector] = [EngineCollector(load, stats, engine_choices(engine), manager)]
    if host is not None and copier is not None:
        collectors.append(HostTierCollector(host, copier, engine.restores.stats))
    return collectors


class EngineCollector(Collector):
    """`load` gives the same numbers that heartbeats carry, so both always agree.

    `choices`: what the engine decided at start, by label. `manager`: of the blocks of its prompts.
    """

    def __init__(
        self,
        load: Callable[[], NodeLoad],
        stats: LoopStats,
        choices: Mapping[str, str] | None = None,
        manager: BlockManager | None = None,
    ) -> None:
        self._load = load
        self._stats = stats
        self._choices = dict(choices or {})
        self._manager = manager

    def collect(self) -> Iterator[Metric]:
        load = self._load()
        yield self._blocks(load)
        if self._choices:
            yield gauge_by(
                list(self._choices),
                "baton_engine_info",
                "1, with what the engine decided at start.",
                {tuple(self._choices.values()): 1},
            )
        if self._manager is not None:
            yield self._prefix_hits(self._manager)
        yield from gauges(
            (
                ("baton_sequences_running", "Sequences that run.", load.num_running),
                ("baton_sequences_waiting", "Sequences that wait.", load.num_waiting),
                ("baton_queued_tokens", "Tokens still to be computed.", load.queued_tokens),
                ("baton_kv_transfers_in_flight", "Transfers in flight.", load.num_transfers),
            )
        )
        yield from self._steps()

    def _blocks(self, load: NodeLoad) -> Metric:
        num_used = load.num_blocks - load.num_free_blocks - load.num_quarantined_blocks
        states = {
            "free": load.num_free_blocks - load.num_cached_blocks,
            "cached": load.num_cached_blocks,
            "used": max(0, num_used),  # the two counts are a moment apart
            "quarantined": load.num_quarantined_blocks,
        }
        return gauge_by(["state"], "baton_kv_blocks", "KV blocks by state.", states)

    def _steps(self) -> Iterator[Metric]:
        stats, cached = self._stats, "Prompt tokens found in the cache."
        return counters(
            (
                ("baton_engine_steps", "Steps run.", stats.num_steps),
                ("baton_engine_step_seconds", "Time inside steps.", stats.step_seconds),
                ("baton_engine_failed_steps", "Steps that raised.", stats.num_failed_steps),
                ("baton_computed_tokens", "Tokens computed.", stats.num_computed_tokens),
                ("baton_sampled_tokens", "Tokens drawn.", stats.num_sampled_tokens),
                ("baton_cached_tokens", cached, stats.num_cached_tokens),
                ("baton_preemptions", "Sequences that lost their blocks.", stats.num_preemptions),
            )
        )

    def _prefix_hits(self, manager: BlockManager) -> Metric:
        """Each is counted when a prompt gets the blocks, so that neither ever falls."""
        num_host_tokens = 0 if manager.host is None else manager.host.stats.num_hit_tokens
        return counter_by(
            ["tier"],
            "baton_prefix_hit_tokens",
            "Prompt tokens found in the cache, by the tier that had them.",
            {"device": manager.num_hit_tokens, "host": num_host_tokens},
        )


class HostTierCollector(Collector):
    """The memory below the pool, and the copies to and from it."""

    def __init__(self, host: HostBlocks, copier: HostCopier, restores: RestoreStats) -> None:
        self._host = host
        self._copier = copier
        self._restores = restores

    def collect(self) -> Iterator[Metric]:
        stats = self._host.stats
        yield self._blocks()
        copied = self._copier.stats
        yield counter_by(
            ["direction"],
            "baton_host_kv_bytes",
            "Bytes of KV copied to (save) and from (load) host memory.",
            {kind.value: done.num_bytes for kind, done in copied.items()},
        )
        yield counter_by(
            ["direction"],
            "baton_host_kv_seconds",
            "Time that copies took, from their turn to their end.",
            {kind.value: done.seconds for kind, done in copied.items()},
        )
        yield counter_by(
            ["reason"],
            "baton_host_kv_failures",
            "Blocks that came back with another digest, copies that failed.",
            {"digest": stats.num_bad_blocks, "copy": stats.num_failed_copies},
        )
        yield CounterMetricFamily(
            "baton_host_kv_lost_blocks",
            "Cached blocks that were evicted before they were saved.",
            value=stats.num_lost_blocks,
        )
        yield self._given()

    def _blocks(self) -> Metric:
        tier = self._host.tier
        num_moving, num_available = tier.num_moving, tier.num_available
        num_cached = min(tier.num_ready, num_available)  # the counts are a moment apart
        states = {"free": num_available - num_cached, "cached": num_cached, "moving": num_moving}
        return gauge_by(
            ["state"], "baton_host_kv_blocks", "KV blocks of host memory by state.", states
        )

    def _given(self) -> Metric:
        stats = self._restores
        return counter_by(
            ["outcome"],
            "baton_host_kv_given_blocks",
            "Blocks that another node asked for and only host memory had: restored to be sent "
            "there, or why not.",
            {
                "restored": stats.num_restored,
                "bad": stats.num_bad,
                "no_room": stats.num_without_room,
                "too_slow": stats.num_too_slow,
            },
        )
