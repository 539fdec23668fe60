"""Counters tell what clients saw, under our names and under those that dashboards know."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.measures import Distribution

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.gateway.running_gateway import RunningGateway

MODEL = "org/test-model"


def scrape(running: RunningGateway) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = httpx.get(f"{running.url}/metrics").text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def running(new_gateway: Callable[..., RunningGateway]) -> RunningGateway:
    return new_gateway()


def test_what_clients_saw_is_what_is_counted(running: RunningGateway) -> None:
    url = f"{running.url}/v1/completions"
    good = {"model": MODEL, "prompt": [40, 41, 42], "max_tokens": 3, "ignore_eos": True}
    for is_stream in (False, True):
        httpx.post(url, json={**good, "stream": is_stream})
    httpx.post(url, json={**good, "n": 0})
    httpx.post(f"{running.url}/v1/chat/completions", json={"model": "nope", "messages": [{}]})
    running.until(lambda: running.gateway.measures.requests[("completions", 200)] == 2)
    found = scrape(running)
    alias = (("engine", "0"), ("model_name", MODEL))
    assert found[("baton_requests_total", (("route", "completions"), ("status", "200")))] == 2
    assert found[("baton_requests_total", (("route", "completions"), ("status", "400")))] == 1
    assert found[("baton_requests_total", (("route", "chat"), ("status", "400")))] == 1
    errors = {labels: n for (name, labels), n in found.items() if "request_errors_total" in name}
    assert {dict(labels)["code"] for labels in errors} == {"invalid_value"}
    assert sum(errors.values()) == 2
    assert found[("baton_sequence_endings_total", (("reason", "length"),))] == 2
    assert found[("baton_generation_tokens_total", ())] == 6
    assert found[("baton_prompt_tokens_total", ())] == 6
    assert found[("baton_time_to_first_token_seconds_count", ())] == 2
    # Tokens that arrive in one frame are one gap.
    num_gaps = found[("baton_inter_token_latency_seconds_count", ())]
    assert 2 <= num_gaps <= 4
    assert found[("baton_handoff_gap_seconds_count", ())] == 2
    assert found[("baton_request_latency_seconds_count", ())] == 2
    assert found[("vllm:generation_tokens_total", alias)] == 6
    assert found[("vllm:prefix_cache_hits_total", alias)] == 4
    assert found[("vllm:prefix_cache_queries_total", alias)] == 6
    assert found[("vllm:time_to_first_token_seconds_count", alias)] == 2
    assert found[("vllm:inter_token_latency_seconds_count", alias)] == num_gaps
    assert found[("vllm:e2e_request_latency_seconds_count", alias)] == 2
    success = (("engine", "0"), ("finished_reason", "length"), ("model_name", MODEL))
    assert found[("vllm:request_success_total", success)] == 2
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert found[(f"vllm:{name}", alias)] == 0


def test_nodes_and_their_transports_are_exported(running: RunningGateway) -> None:
    found = scrape(running)
    decode = (("node", "decode-0"), ("role", "decode"))
    assert found[("baton_nodes", (("role", "decode"), ("state", "ready")))] == 1
    assert found[("baton_node_connected", decode)] == 1
    assert found[("baton_node_kv_blocks", (*decode, ("state", "free")))] == 100_000
    assert found[("baton_kv_transport_info", (*decode, ("transport", "loopback")))] == 1
    assert found[("baton_build_info", _build(found))] == 1


def _build(
    found: dict[tuple[str, tuple[tuple[str, str], ...]], float],
) -> tuple[tuple[str, str], ...]:
    return next(labels for name, labels in found if name == "baton_build_info")


def test_a_distribution_counts_a_value_on_a_bound_below_it() -> None:
    distribution = Distribution((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.5):
        distribution.observe(value)
    assert distribution.counts == [2, 1, 1]
    assert (distribution.total, distribution.num_observed) == (5.5, 4)
