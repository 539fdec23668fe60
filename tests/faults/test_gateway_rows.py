"""Rows G1 to G5 of the fault matrix: one of two gateways dies, stands still, is busy, runs out of
descriptors, or starts with a registry full of nodes that are gone. G6 is in `test_link_rows`."""

from __future__ import annotations

import http.client
import resource
import socket
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from cluster.registry import encode_entry
from tests.e2e.cluster_process import eventually
from tests.faults.cluster_rows import NUM_REQUESTS
from tests.faults.leaks import held_by
from tests.faults.metrics import scrape
from tests.faults.nemesis import verify
from tests.faults.registry_entries import stale_entry

if TYPE_CHECKING:
    from tests.faults.cluster_rows import Rows

pytestmark = pytest.mark.faults
GATEWAY = "gateway-1"  # that of the requests with odd numbers; the admin API is at the other
NUM_IDLE = 100
NUM_SPARE = 40  # descriptors that it has left for them


def odd(rows: Rows) -> set[int]:
    return {ask.number for ask in rows.asks if ask.number % 2}


def test_g1_a_gateway_dies_and_its_streams_end_on_the_nodes(cached: Rows) -> None:
    with cached.load() as history:
        history.wait_for_tokens(NUM_REQUESTS)  # early: none of its streams has ended yet
        cached.nemesis.kill(GATEWAY)
    assert "broken" in history.kinds()
    cached.check(history, may_break=odd(cached), may_err=odd(cached))
    cached.check_recovered()


def test_g2_a_gateway_stands_still_and_its_streams_go_on_when_it_wakes(cached: Rows) -> None:
    with cached.load() as history:
        history.wait_for_tokens(NUM_REQUESTS)
        pid = cached.nemesis.stop(GATEWAY)
        address = urlsplit(cached.cluster.urls[1])
        check = http.client.HTTPConnection(address.hostname or "", address.port, timeout=1.0)
        check.request("GET", "/readyz")
        with pytest.raises(TimeoutError):  # what a load balancer goes by
            check.getresponse()
        check.close()
        cached.nemesis.resume(pid)
    cached.check(history)
    assert history.codes() == set()
    cached.check_recovered()


def test_g3_a_gateway_that_had_no_time_says_so(cached: Rows) -> None:
    """Stopped for two seconds: to its event loop that is a call that blocks for as long."""
    address = cached.cluster.metrics_address(GATEWAY)
    stalls = scrape(address).value("baton_event_loop_stalls_total")
    with cached.load() as history:
        history.wait_for_tokens(1)
        pid = cached.nemesis.stop(GATEWAY)
        time.sleep(2.0)  # how long the fault lasts
        cached.nemesis.resume(pid)
    cached.check(history)
    assert history.codes() == set()
    verify(
        lambda: scrape(address).value("baton_event_loop_stalls_total") > stalls,
        "the stall was not counted",
    )
    cached.check_recovered()


def test_g4_a_gateway_that_idle_connections_leave_no_descriptor_serves_when_they_have_gone(
    cached: Rows,
) -> None:
    """Meanwhile the other one serves."""
    pid = cached.cluster.child(GATEWAY)
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    held = cached.before[GATEWAY].num_descriptors
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (held + NUM_SPARE, limits[1]))
    address = urlsplit(cached.cluster.urls[1])
    idle: list[socket.socket] = []
    try:
        place = (address.hostname, address.port)
        idle += [socket.create_connection(place, timeout=5) for _ in range(NUM_IDLE)]
        verify(lambda: held_by(pid).num_descriptors >= held + NUM_SPARE, "it has some left")
        others = [ask for ask in cached.asks if ask.number % 2 == 0]
        with cached.load(others, is_counted=False) as history:
            pass
        cached.check(history)
        assert history.codes() == set()
    finally:
        for each in idle:
            each.close()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
    assert cached.cluster.child(GATEWAY) == pid
    cached.check_recovered()


def test_g5_a_gateway_that_starts_among_dead_entries_serves_at_once(cached: Rows) -> None:
    with cached.cluster.redis.client() as client:
        document = client.get("baton:node:prefill-0")
        assert isinstance(document, bytes)
        for number in range(20):
            name = f"prefill-ghost-{number}"
            client.set(f"baton:node:{name}", encode_entry(stale_entry(document, name=name)), ex=30)
            client.sadd("baton:nodes", name)
        cached.nemesis.kill("gateway")
        eventually(lambda: cached.cluster.is_ready("gateway"), 60)
        with cached.load() as history:
            pass
        nodes = cached.cluster.nodes()
        assert "prefill-ghost-0" in nodes, "the gateway saw no dead entry"
        for number in range(20):
            client.delete(f"baton:node:prefill-ghost-{number}")
    cached.check(history)
    assert history.codes() == set()
    cached.check_recovered()
