"""The gateway in the Prometheus format: its own families, and vLLM's names for dashboards.

`GatewayCollector` reads the live counts when scraped. The `vllm:` families repeat what the
native ones say under names and buckets that existing dashboards and autoscalers know; only the
gateway exports them, so sums over a cluster never count twice.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, TypeVar

from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.metric_families import counter_by, counters, gauge_by

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from gateway.measures import Distribution, Measures
    from gateway.nodes import NodeEntry, Nodes

Key = TypeVar("Key", str, tuple[str, str])

_ALIAS_LABELS = ["model_name", "engine"]
_ENGINE = "0"
_NODE_LABELS = ["node", "role"]
_NODE_GAUGES: tuple[tuple[str, str, Callable[[NodeEntry], float]], ...] = (
    (
        "connected",
        "1 while this gateway has a session with the node.",
        lambda entry: entry.client.is_connected,
    ),
    (
        "sequences_running",
        "Sequences that run, as the node last said.",
        lambda entry: entry.info.load.num_running,
    ),
    (
        "sequences_waiting",
        "Sequences that wait, as the node last said.",
        lambda entry: entry.info.load.num_waiting,
    ),
    (
        "queued_tokens",
        "Tokens still to be computed, as the node last said.",
        lambda entry: entry.info.load.queued_tokens,
    ),
    (
        "transfers",
        "KV transfers in flight, as the node last said.",
        lambda entry: entry.info.load.num_transfers,
    ),
)


class GatewayCollector(Collector):
    def __init__(
        self,
        measures: Measures,
        nodes: Nodes,
        model_name: str,
        tokens_queued: Callable[[], int],
        retries_left: Callable[[], float],
    ) -> None:
        self._measures = measures
        self._nodes = nodes
        self._model_name = model_name
        self._tokens_queued = tokens_queued
        self._retries_left = retries_left

    def collect(self) -> Iterator[Metric]:
        yield from self._requests()
        yield from self._endings()
        yield from self._latencies()
        yield from self._node_gauges()
        yield from self._aliases()

    def _requests(self) -> Iterator[Metric]:
        measures = self._measures
        yield counter_by(
            ["route", "status"],
            "baton_requests",
            "Requests by route and HTTP status; of a stream that broke, that of its error.",
            {(route, str(status)): n for (route, status), n in sorted(measures.requests.items())},
        )
        yield gauge_by(
            ["state"],
            "baton_sequences_in_flight",
            "Sequences that wait for their first token, or have it and run.",
            {"waiting": measures.num_waiting, "running": measures.num_running},
        )
        yield GaugeMetricFamily(
            "baton_queued_prompt_tokens",
            "Prompt tokens of sequences that wait for their first token.",
            value=self._tokens_queued(),
        )
        yield from counters(
            (
                ("baton_disconnected_clients", "Clients that left early.",
                 measures.num_disconnected),
                ("baton_prompt_tokens", "Prompt tokens taken in.", measures.num_prompt_tokens),
                ("baton_cached_prompt_tokens", "Prompt tokens not recomputed.",
                 measures.num_cached_tokens),
                ("baton_generation_tokens", "Tokens generated.", measures.num_generated_tokens),
            )
        )  # fmt: skip

    def _endings(self) -> Iterator[Metric]:
        """How requests, sequences and attempts ended otherwise than hoped."""
        measures = self._measures
        yield counter_by(
            ["code", "reason"],
            "baton_request_errors",
            "Requests that ended in an error, by its code and cause.",
            _sorted(measures.errors),
        )
        yield counter_by(
            ["reason"],
            "baton_sequence_endings",
            "Sequences by how they ended.",
            _sorted(measures.endings),
        )
        yield counter_by(
            ["reason"],
            "baton_admission_rejections",
            "Requests refused as overload.",
            _sorted(measures.rejections),
        )
        yield counter_by(
            ["kind", "reason"],
            "baton_retries",
            "Attempts on other nodes, by kind and cause.",
            _sorted(measures.retries),
        )
        yield GaugeMetricFamily(
            "baton_retries_left",
            "Re-dispatches that the budget still allows; each request adds a tenth of one.",
            value=self._retries_left(),
        )
        yield from self._pairs()

    def _pairs(self) -> Iterator[Metric]:
        measures = self._measures
        yield GaugeMetricFamily(
            "baton_pairs_held_back",
            "Pairs of nodes between which hand-offs failed, and none has succeeded since.",
            value=measures.num_pairs_held_back,
        )
        yield counter_by(
            ["reason"],
            "baton_pair_holds",
            "Times that a pair of nodes was held back, by cause.",
            _sorted(measures.pair_holds),
        )

    def _latencies(self) -> Iterator[Metric]:
        measures = self._measures
        for name, text, distribution in (
            (
                "time_to_first_token_seconds",
                "Arrival to first token sent.",
                measures.time_to_first_token,
            ),
            (
                "inter_token_latency_seconds",
                "Every gap between tokens.",
                measures.inter_token_latency,
            ),
            (
                "time_per_output_token_seconds",
                "(last - first) / (n - 1) per sequence.",
                measures.time_per_output_token,
            ),
            ("request_latency_seconds", "Arrival to last token.", measures.request_latency),
            (
                "handoff_gap_seconds",
                "First to second token of handed-off sequences.",
                measures.handoff_gap,
            ),
            (
                "routing_decision_seconds",
                "Time to place one sequence.",
                measures.routing_decision,
            ),
        ):
            yield _histogram(f"baton_{name}", text, distribution, [], [])

    def _node_gauges(self) -> Iterator[Metric]:
        entries = list(self._nodes)
        states = Counter((e.info.role.value, e.info.state.value) for e in entries)
        yield gauge_by(
            ["role", "state"], "baton_nodes", "Nodes by role and state.", _sorted(states)
        )
        for name, text, read in _NODE_GAUGES:
            values = {_node_labels(entry): read(entry) for entry in entries}
            yield gauge_by(_NODE_LABELS, f"baton_node_{name}", text, values)
        yield from self._block_gauges(entries)

    def _block_gauges(self, entries: list[NodeEntry]) -> Iterator[Metric]:
        blocks: dict[tuple[str, ...], int] = {}
        transports: dict[tuple[str, ...], int] = {}
        for entry in entries:
            labels, load = _node_labels(entry), entry.info.load
            blocks[*labels, "free"] = load.num_free_blocks - load.num_cached_blocks
            blocks[*labels, "cached"] = load.num_cached_blocks
            blocks[*labels, "used"] = load.num_blocks - load.num_free_blocks
            blocks[*labels, "quarantined"] = load.num_quarantined_blocks
            transports |= {(*labels, transport): 1 for transport in entry.info.transports}
        yield gauge_by(
            [*_NODE_LABELS, "state"],
            "baton_node_kv_blocks",
            "KV blocks by state, as the node last said.",
            blocks,
        )
        if transports:  # nothing is known before the first pair of nodes has met
            yield gauge_by(
                [*_NODE_LABELS, "transport"],
                "baton_kv_transport_info",
                "1 for each transport that carries a node's KV.",
                transports,
            )

    def _aliases(self) -> Iterator[Metric]:
        measures = self._measures
        labels = (self._model_name, _ENGINE)
        load = self._nodes.decode_load()
        used = (load.num_blocks - load.num_free_blocks) / load.num_blocks if load.num_blocks else 0
        for name, text, value in (
            ("num_requests_running", "Sequences with a first token.", measures.num_running),
            ("num_requests_waiting", "Sequences without one.", measures.num_waiting),
            ("kv_cache_usage_perc", "Used KV blocks of decode nodes, 0 to 1.", used),
        ):
            yield gauge_by(_ALIAS_LABELS, f"vllm:{name}", text, {labels: value})
        for name, text, count in (
            ("prompt_tokens", "Prompt tokens.", measures.num_prompt_tokens),
            ("prompt_tokens_cached", "Cached prompt tokens.", measures.num_cached_tokens),
            ("generation_tokens", "Generated tokens.", measures.num_generated_tokens),
            ("prefix_cache_queries", "Prompt tokens looked up.", measures.num_prompt_tokens),
            ("prefix_cache_hits", "Prompt tokens found cached.", measures.num_cached_tokens),
        ):
            yield counter_by(_ALIAS_LABELS, f"vllm:{name}", text, {labels: count})
        yield counter_by(
            [*_ALIAS_LABELS, "finished_reason"],
            "vllm:request_success",
            "Sequences by finished reason.",
            {
                (*labels, reason): measures.endings[reason]
                for reason in ("stop", "length", "abort", "error")
            },
        )
        yield from self._alias_histograms(labels)

    def _alias_histograms(self, labels: tuple[str, str]) -> Iterator[Metric]:
        measures = self._measures
        for name, text, distribution in (
            ("time_to_first_token_seconds", "TTFT.", measures.time_to_first_token),
            ("inter_token_latency_seconds", "ITL.", measures.coarse_inter_token_latency),
            (
                "request_time_per_output_token_seconds",
                "TPOT.",
                measures.coarse_time_per_output_token,
            ),
            ("e2e_request_latency_seconds", "E2E latency.", measures.request_latency),
            ("request_prompt_tokens", "Prompt lengths.", measures.prompt_tokens),
            ("request_generation_tokens", "Output lengths.", measures.generation_tokens),
        ):
            yield _histogram(f"vllm:{name}", text, distribution, _ALIAS_LABELS, list(labels))


def _node_labels(entry: NodeEntry) -> tuple[str, str]:
    return entry.info.id.name, entry.info.role.value


def _sorted(counts: Mapping[Key, int]) -> dict[Key, int]:
    return dict(sorted(counts.items()))


def _histogram(
    name: str, text: str, distribution: Distribution, label_names: list[str], labels: list[str]
) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, text, labels=label_names)
    buckets: list[tuple[str, float]] = []
    cumulative = 0
    for bound, count in zip((*distribution.bounds, None), distribution.counts, strict=True):
        cumulative += count
        buckets.append(("+Inf" if bound is None else str(float(bound)), cumulative))
    family.add_metric(labels, buckets, distribution.total)
    return family
