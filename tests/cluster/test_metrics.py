from __future__ import annotations

import urllib.request

import pytest
from prometheus_client import CollectorRegistry, Counter

from cluster import metrics
from cluster.errors import ConfigError


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        text: str = response.read().decode()
    return text


def test_a_registry_is_served_on_a_free_port_until_closed() -> None:
    registry = CollectorRegistry()
    Counter("baton_things_total", "Things.", registry=registry).inc(3)
    server = metrics.start_metrics_server(registry, "127.0.0.1", 0)
    try:
        assert "baton_things_total 3.0" in scrape(server.port)
    finally:
        server.close()
        server.close()
    with pytest.raises(OSError, match="refused"):
        scrape(server.port)


def test_a_taken_port_is_a_config_error() -> None:
    first = metrics.start_metrics_server(CollectorRegistry(), "127.0.0.1", 0)
    try:
        with pytest.raises(ConfigError, match="cannot listen") as raised:
            metrics.start_metrics_server(CollectorRegistry(), "127.0.0.1", first.port)
        assert raised.value.param == "metrics_port"
    finally:
        first.close()


def test_a_process_exports_its_build_and_nothing_shares_the_default_registry() -> None:
    labels = {"version": "1.2", "role": "decode"}
    for _ in range(2):  # a second registry in one process must not clash
        registry = metrics.new_registry(role="decode", version="1.2")
        metrics.StoreMetrics(registry)
    found = [
        sample
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "baton_build_info"
    ]
    assert len(found) == 1
    assert labels.items() <= found[0].labels.items()


@pytest.mark.parametrize(
    "bounds",
    [
        metrics.TIME_TO_FIRST_TOKEN_BUCKETS,
        metrics.INTER_TOKEN_BUCKETS,
        metrics.REQUEST_SECONDS_BUCKETS,
        metrics.INTERNAL_SECONDS_BUCKETS,
        metrics.token_count_buckets(4096),
    ],
)
def test_bounds_rise(bounds: tuple[float, ...]) -> None:
    assert list(bounds) == sorted(set(bounds))


def test_bounds_are_those_that_dashboards_know() -> None:
    assert len(metrics.TIME_TO_FIRST_TOKEN_BUCKETS) == 22
    assert len(metrics.INTER_TOKEN_BUCKETS) == 19
    assert len(metrics.REQUEST_SECONDS_BUCKETS) == 21
    assert metrics.token_count_buckets(100) == (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
