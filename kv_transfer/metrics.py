"""Transfers in the Prometheus format, read from `TransferStats` when scraped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.metric_families import counter_by, counters, gauge_by
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
        """`agent`: whose staging slots to count, and of those beside it."""
        self._stats = stats
        self._transports = transports
        self._agent = agent

    def collect(self) -> Iterator[Metric]:
        yield from self._frames()
        yield from self._failures()
        yield from self._plain()
        yield gauge_by(
            ["transport"],
            "baton_kv_transport_in_use",
            "1 for each transport in use.",
            dict.fromkeys(sorted(set(self._transports())), 1),
        )
        if self._agent is not None:
            yield from self._memory(self._agent)

    def _frames(self) -> Iterator[Metric]:
        stats = self._stats
        yield counter_by(
            ["transport"], "baton_kv_transfer_bytes", "KV bytes moved.", stats.bytes_by_transport
        )
        yield counter_by(
            ["transport"],
            "baton_kv_transfer_frame_seconds",
            "Time frames were in flight.",
            stats.seconds_by_transport,
        )

    def _failures(self) -> Iterator[Metric]:
        stats = self._stats
        yield counter_by(
            ["reason", "policy"], "baton_kv_load_failures", "KV loads that failed.", stats.failures
        )
        yield counter_by(
            ["reason"],
            "baton_kv_recomputes",
            "Failed KV loads whose missing blocks were computed here.",
            stats.recomputes,
        )
        corrupt = dict(list(stats.corrupt_frames_by_peer.items()))
        yield counter_by(
            ["peer"], "baton_kv_corrupt_frames", "Frames whose digests did not match.", corrupt
        )
        suspects = [peer for peer, n in corrupt.items() if n >= CORRUPT_FRAMES_OF_A_SUSPECT]
        yield gauge_by(
            ["peer"],
            "baton_kv_suspect_peer",
            "1 for each peer that corrupts KV repeatedly.",
            dict.fromkeys(suspects, 1),
        )
        yield counter_by(
            ["reason"],
            "baton_kv_frames_dropped",
            "Frames refused or drained.",
            stats.frames_dropped,
        )

    def _memory(self, agent: TransferAgent) -> Iterator[Metric]:
        quarantine = agent.quarantine
        num_slots = sum(staging.num_slots for staging in agent.stagings)
        num_free = sum(staging.num_free for staging in agent.stagings)
        num_kept = quarantine.num_kept_slots
        states = {
            "free": num_free,
            "taken": num_slots - num_free - num_kept,
            "lost": num_kept,
        }
        yield gauge_by(["state"], "baton_kv_staging_slots", "Staging slots by state.", states)
        yield GaugeMetricFamily(
            "baton_kv_lost_blocks",
            "KV blocks that no cut connection gave back: out of use until a restart.",
            value=quarantine.num_kept_blocks,
        )

    def _plain(self) -> Iterator[Metric]:
        stats = self._stats
        values: tuple[tuple[str, str, float], ...] = (
            ("baton_kv_transfer_frames", "Frames moved.", stats.frames),
            (
                "baton_kv_reads_held_back",
                "Frames that waited for --kv-receive-rate.",
                stats.reads_held_back,
            ),
            ("baton_kv_transfers_done", "Hand-offs that were committed.", stats.transfers_done),
            (
                "baton_kv_commits_unknown",
                "Commits that a lost connection left unanswered, at their sender. What became of "
                "them the receiver counts, if it lives: as done, or as a failure.",
                stats.commits_unknown,
            ),
            ("baton_kv_transfer_seconds", "Reserve to commit, summed.", stats.transfer_seconds),
            ("baton_kv_handshakes_refused", "Pairings refused.", stats.handshakes_refused),
            ("baton_kv_pairings", "Pairings made.", stats.pairings),
            ("baton_kv_revocations", "Connections cut to take blocks back.", stats.revocations),
        )
        return counters(values)
