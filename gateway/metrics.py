"""The gateway in the Prometheus format: its own families, and vLLM's names for dashboards.

`GatewayCollector` reads the live counts when scraped. The `vllm:` families repeat what the
native ones say under names and buckets that existing dashboards and autoscalers know; only the
gateway exports them, so sums over a cluster never count twice.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gateway.measures import Distribution, Measures
    from gateway.nodes import NodeEntry, Nodes

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
    ) -> None:
        self._measures = measures
        self._nodes = nodes
        self._model_name = model_name
        self._tokens_queued = tokens_queued

    def collect(self) -> Iterator[Metric]:
        yield from self._requests()
        yield from self._latencies()
        yield from self._node_gauges()
        yield from self._aliases()

    def _requests(self) -> Iterator[Metric]:
        measures = self._measures
        requests = CounterMetricFamily(
            "baton_requests", "Requests by route and HTTP status.", labels=["route", "status"]
        )
        for (route, status), count in sorted(measures.requests.items()):
            requests.add_metric([route, str(status)], count)
        yield requests
        errors = CounterMetricFamily(
            "baton_request_errors",
            "Requests that ended in an error, by its code and cause.",
            labels=["code", "reason"],
        )
        for labels, count in sorted(measures.errors.items()):
            errors.add_metric(list(labels), count)
        yield errors
        in_flight = GaugeMetricFamily(
            "baton_sequences_in_flight",
            "Sequences that wait for their first token, or have it and run.",
            labels=["state"],
        )
        in_flight.add_metric(["waiting"], measures.num_waiting)
        in_flight.add_metric(["running"], measures.num_running)
        yield in_flight
        yield GaugeMetricFamily(
            "baton_queued_prompt_tokens",
            "Prompt tokens of sequences that wait for their first token.",
            value=self._tokens_queued(),
        )
        yield _by_reason("baton_sequence_endings", "Sequences by how they ended.", measures.endings)
        yield _by_reason(
            "baton_admission_rejections", "Requests refused as overload.", measures.rejections
        )
        retries = CounterMetricFamily(
            "baton_retries",
            "Attempts on other nodes, by kind and cause.",
            labels=["kind", "reason"],
        )
        for kind, count in sorted(measures.retries.items()):
            retries.add_metric(list(kind), count)
        yield retries
        for name, text, count in (
            ("disconnected_clients", "Clients that left early.", measures.num_disconnected),
            ("prompt_tokens", "Prompt tokens taken in.", measures.num_prompt_tokens),
            ("cached_prompt_tokens", "Prompt tokens not recomputed.", measures.num_cached_tokens),
            ("generation_tokens", "Tokens generated.", measures.num_generated_tokens),
        ):
            yield CounterMetricFamily(f"baton_{name}", text, value=count)

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
        nodes = GaugeMetricFamily(
            "baton_nodes", "Nodes by role and state.", labels=["role", "state"]
        )
        for (role, state), count in sorted(states.items()):
            nodes.add_metric([role, state], count)
        yield nodes
        for name, text, read in _NODE_GAUGES:
            family = GaugeMetricFamily(f"baton_node_{name}", text, labels=_NODE_LABELS)
            for entry in entries:
                family.add_metric(_node_labels(entry), read(entry))
            yield family
        yield from self._block_gauges(entries)

    def _block_gauges(self, entries: list[NodeEntry]) -> Iterator[Metric]:
        blocks = GaugeMetricFamily(
            "baton_node_kv_blocks",
            "KV blocks by state, as the node last said.",
            labels=[*_NODE_LABELS, "state"],
        )
        transports = GaugeMetricFamily(
            "baton_kv_transport_info",
            "1 for each transport that carries a node's KV.",
            labels=[*_NODE_LABELS, "transport"],
        )
        for entry in entries:
            labels, load = _node_labels(entry), entry.info.load
            for state, count in (
                ("free", load.num_free_blocks - load.num_cached_blocks),
                ("cached", load.num_cached_blocks),
                ("used", load.num_blocks - load.num_free_blocks),
                ("quarantined", load.num_quarantined_blocks),
            ):
                blocks.add_metric([*labels, state], count)
            for transport in entry.info.transports:
                transports.add_metric([*labels, transport], 1)
        yield blocks
        if transports.samples:  # nothing is known before the first pair of nodes has met
            yield transports

    def _aliases(self) -> Iterator[Metric]:
        measures = self._measures
        labels = [self._model_name, _ENGINE]
        load = self._nodes.decode_load()
        used = (load.num_blocks - load.num_free_blocks) / load.num_blocks if load.num_blocks else 0
        for name, text, value in (
            ("num_requests_running", "Sequences with a first token.", measures.num_running),
            ("num_requests_waiting", "Sequences without one.", measures.num_waiting),
            ("kv_cache_usage_perc", "Used KV blocks of decode nodes, 0 to 1.", used),
        ):
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=_ALIAS_LABELS)
            gauge.add_metric(labels, value)
            yield gauge
        for name, text, count in (
            ("prompt_tokens", "Prompt tokens.", measures.num_prompt_tokens),
            ("prompt_tokens_cached", "Cached prompt tokens.", measures.num_cached_tokens),
            ("generation_tokens", "Generated tokens.", measures.num_generated_tokens),
            ("prefix_cache_queries", "Prompt tokens looked up.", measures.num_prompt_tokens),
            ("prefix_cache_hits", "Prompt tokens found cached.", measures.num_cached_tokens),
        ):
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=_ALIAS_LABELS)
            counter.add_metric(labels, count)
            yield counter
        success = CounterMetricFamily(
            "vllm:request_success",
            "Sequences by finished reason.",
            labels=[*_ALIAS_LABELS, "finished_reason"],
        )
        for reason in ("stop", "length", "abort", "error"):
            success.add_metric([*labels, reason], measures.endings[reason])
        yield success
        yield from self._alias_histograms(labels)

    def _alias_histograms(self, labels: list[str]) -> Iterator[Metric]:
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
            yield _histogram(f"vllm:{name}", text, distribution, _ALIAS_LABELS, labels)


def _node_labels(entry: NodeEntry) -> list[str]:
    return [entry.info.id.name, entry.info.role.value]


def _by_reason(name: str, text: str, counts: Counter[str]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=["reason"])
    for reason, count in sorted(counts.items()):
        family.add_metric([reason], count)
    return family


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
