"""Transfers in the Prometheus format, read from `TransferStats` when scraped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kv_transfer.stats import CORRUPT_FRAMES_OF_A_SUSPECT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kv_transfer.agent import TransferAgent
    from kv_transfer.stats import TransferStats


class TransferCollector(Collector):
    """`transports` names those in use towards peers now. Scraped on a thread of its own: tables
    that the event loop may extend meanwhile are copied first."""

    def __init__(
        self,
        stats: TransferStats,
        *,
        transports: Callable[[], Sequence[str]],
        agent: TransferAgent | None = None,
    ) -> None:
        """`agent`: whose staging slots to count."""
        self._stats = stats
        self._transports = transports
        self._agent = agent

    def collect(self) -> Iterator[Metric]:
        stats = self._stats
        moved = CounterMetricFamily(
            "baton_kv_transfer_bytes", "KV bytes moved.", labels=["transport"]
        )
        seconds = CounterMetricFamily(
            "baton_kv_transfer_frame_seconds", "Time frames were in flight.", labels=["transport"]
        )
        for transport, value in list(stats.bytes_by_transport.items()):
            moved.add_metric([transport], value)
        for transport, spent in list(stats.seconds_by_transport.items()):
            seconds.add_metric([transport], spent)
        failures = CounterMetricFamily(
            "baton_kv_load_failures", "KV loads that failed.", labels=["reason", "policy"]
        )
        for (reason, policy), count in list(stats.failures.items()):
            failures.add_metric([reason, policy], count)
        recomputes = CounterMetricFamily(
            "baton_kv_recomputes",
            "Failed KV loads whose missing blocks were computed here.",
            labels=["reason"],
        )
        for reason, count in list(stats.recomputes.items()):
            recomputes.add_metric([reason], count)
        corrupt = CounterMetricFamily(
            "baton_kv_corrupt_frames", "Frames whose digests did not match.", labels=["peer"]
        )
        suspects = GaugeMetricFamily(
            "baton_kv_suspect_peer", "1 for each peer that corrupts KV repeatedly.", labels=["peer"]
        )
        for peer, count in list(stats.corrupt_frames_by_peer.items()):
            corrupt.add_metric([peer], count)
            if count >= CORRUPT_FRAMES_OF_A_SUSPECT:
                suspects.add_metric([peer], 1)
        dropped = CounterMetricFamily(
            "baton_kv_frames_dropped", "Frames refused or drained.", labels=["reason"]
        )
        for reason, count in list(stats.frames_dropped.items()):
            dropped.add_metric([reason], count)
        yield from (moved, seconds, failures, recomputes, corrupt, suspects, dropped)
        yield from self._plain(stats)
        info = GaugeMetricFamily(
            "baton_kv_transport_in_use", "1 for each transport in use.", labels=["transport"]
        )
        for transport in sorted(set(self._transports())):
            info.add_metric([transport], 1)
        yield info
        if self._agent is not None:
            yield from self._memory(self._agent)

    def _memory(self, agent: TransferAgent) -> Iterator[Metric]:
        staging, quarantine = agent.staging, agent.quarantine
        slots = GaugeMetricFamily(
            "baton_kv_staging_slots", "Staging slots by state.", labels=["state"]
        )
        num_free, num_kept = staging.num_free, quarantine.num_kept_slots
        slots.add_metric(["free"], num_free)
        slots.add_metric(["taken"], staging.num_slots - num_free - num_kept)
        slots.add_metric(["lost"], num_kept)
        yield slots
        yield GaugeMetricFamily(
            "baton_kv_lost_blocks",
            "KV blocks that no cut connection gave back: out of use until a restart.",
            value=quarantine.num_kept_blocks,
        )

    def _plain(self, stats: TransferStats) -> Iterator[Metric]:
        values: tuple[tuple[str, str, float], ...] = (
            ("baton_kv_transfer_frames", "Frames moved.", stats.frames),
            ("baton_kv_transfers_done", "Hand-offs that were committed.", stats.transfers_done),
            ("baton_kv_transfer_seconds", "Reserve to commit, summed.", stats.transfer_seconds),
            ("baton_kv_handshakes_refused", "Pairings refused.", stats.handshakes_refused),
            ("baton_kv_pairings", "Pairings made.", stats.pairings),
            ("baton_kv_revocations", "Connections cut to take blocks back.", stats.revocations),
        )
        for name, text, value in values:
            yield CounterMetricFamily(name, text, value=value)
