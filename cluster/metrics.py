"""What every process exports in the same way: bucket bounds, the endpoint, the store's counters.

Each process makes one `CollectorRegistry`, each room adds its own typed metrics object to it,
and `start_metrics_server` serves it. Nothing uses the global default registry.
"""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    ProcessCollector,
    start_http_server,
)

from cluster.errors import cannot_listen

if TYPE_CHECKING:
    import threading
    from wsgiref.simple_server import WSGIServer

# Seconds. A: time to first token. B: gaps between tokens. C: whole requests and their phases.
TIME_TO_FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
INTER_TOKEN_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_SECONDS_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
# Seconds. Work inside a process: routing, index lookups, hand-off gaps.
INTERNAL_SECONDS_BUCKETS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0),
)


def token_count_buckets(max_model_len: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50, ... up to the longest context."""
    bounds: list[float] = []
    scale = 1
    while scale <= max_model_len:
        bounds += [float(scale * m) for m in (1, 2, 5) if scale * m <= max_model_len]
        scale *= 10
    return tuple(bounds)


def new_registry(*, role: str, version: str) -> CollectorRegistry:
    """The registry of a process, with what any process exports: itself and its build."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    GCCollector(registry=registry)
    build = Gauge(
        "baton_build_info",
        "1, with the version of what runs.",
        ("version", "role", "python"),
        registry=registry,
    )
    build.labels(version, role, platform.python_version()).set(1)
    return registry


class StoreMetrics:
    """How the shared store (Redis) serves this process."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        registry = CollectorRegistry() if registry is None else registry
        self.calls = Counter(
            "baton_store_calls_total",
            "Calls to the registry or the prefix index by outcome: ok, error, timeout, refused.",
            ("store", "outcome"),
            registry=registry,
        )
        self.poisoned = Counter(
            "baton_store_poisoned_entries_total",
            "Entries that were ignored because they are malformed.",
            ("store",),
            registry=registry,
        )
        self.is_up = Gauge(
            "baton_store_up",
            "1 while calls to the store succeed, 0 while they are not even tried.",
            ("store",),
            registry=registry,
        )
        self.lookup_seconds = Histogram(
            "baton_prefix_index_lookup_seconds",
            "Time to find the longest cached prefix per node.",
            registry=registry,
            buckets=INTERNAL_SECONDS_BUCKETS,
        )


class MetricsServer:
    """Serves one registry in the Prometheus text format. `port` is the one in use."""

    def __init__(self, server: WSGIServer, thread: threading.Thread) -> None:
        self._server = server
        self._thread = thread
        self.port: int = server.server_port

    def close(self) -> None:
        """Stop answering and give the port back. Calling it again does nothing."""
        if not self._thread.is_alive():
            return
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def start_metrics_server(registry: CollectorRegistry, host: str, port: int) -> MetricsServer:
    """Serve `registry` on its own thread; port 0 takes a free one. `ConfigError` when taken."""
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise cannot_listen(f"{host}:{port}", error, param="metrics_port") from error
    return MetricsServer(server, thread)
