"""Rows D1, D2, D4 and D5 of the fault matrix: decode nodes that die or stand still, and requests
that are given up in each of their states; and pauses of every node under load. D3 is in
`test_small_pools`."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest

from cluster.registry import encode_entry
from tests.e2e.cluster_process import eventually
from tests.faults.asks import draw_asks
from tests.faults.cluster_rows import (
    DECODE,
    HALF,
    LEASE_SECONDS,
    NUM_REQUESTS,
    NUM_TOKENS,
    PREFILL,
    SEED,
)
from tests.faults.kv_link import Order
from tests.faults.nemesis import verify
from tests.faults.registry_entries import stale_entry
from tests.faults.spoiled_bytes import Spoil

if TYPE_CHECKING:
    from tests.faults.cluster_rows import Rows

pytestmark = pytest.mark.faults
LAST = NUM_REQUESTS * NUM_TOKENS - NUM_REQUESTS
NODES = (*PREFILL, *DECODE)
DRAIN_SECONDS = 2.0  # an aborted transfer has 1, and a sweep comes now and then
NUM_STREAMS, NUM_PAUSES, PAUSE_SECONDS = 64, 16, LEASE_SECONDS / 10


@pytest.mark.parametrize("after", [0, 1, HALF, LAST], ids=["0", "1", "mid", "last"])
def test_d1_a_decode_node_is_killed_after_some_tokens(rows: Rows, policy: str, after: int) -> None:
    with rows.load() as history:
        history.wait_for_tokens(after)
        rows.nemesis.kill("decode-0")
    rows.check(history)
    assert policy == "fail" or not history.codes()
    rows.check_recovered()


def test_d2_a_decode_node_stands_still_for_longer_than_a_lease(rows: Rows, policy: str) -> None:
    with rows.load() as history:
        history.wait_for_tokens(HALF)
        pid = rows.nemesis.stop("decode-0")
        stopped_at = time.monotonic()
    rows.check(history)
    assert policy == "fail" or not history.codes()
    left = LEASE_SECONDS + DRAIN_SECONDS - (time.monotonic() - stopped_at)
    time.sleep(max(0.0, left))  # how long the fault lasts
    with rows.load() as after:
        rows.nemesis.resume(pid)
    rows.check(after)
    rows.check_recovered()


def test_64_streams_outlive_16_pauses_of_their_nodes(rows: Rows) -> None:
    """Each node in turn stands still, for less than a lease: nobody may take it for lost, no
    digest may differ, and in the end nothing runs anywhere."""
    asks = draw_asks(SEED, NUM_STREAMS, num_tokens=NUM_TOKENS)
    oracle = rows.undisturbed(asks)
    failures = rows.counted("baton_kv_load_failures_total")
    with rows.load(asks) as history:
        for number in range(NUM_PAUSES):
            history.wait_for_tokens(number * NUM_STREAMS * NUM_TOKENS // NUM_PAUSES)
            pid = rows.nemesis.stop(NODES[number % len(NODES)])
            time.sleep(PAUSE_SECONDS)  # how long the fault lasts
            rows.nemesis.resume(pid)
    rows.check(history, oracle)
    assert history.codes() == set()
    assert rows.counted("baton_kv_load_failures_total") == failures
    rows.check_nothing_is_held()
    assert rows.counted("baton_sequences_running", NODES) == 0


@pytest.mark.parametrize("state", ["waiting for kv", "partial", "first token", "decoding", "last"])
def test_d4_a_request_is_given_up_in_each_state(rows: Rows, state: str) -> None:
    """By the operator, as far as it can be held in that state; by its client after that."""
    leaves = {"first token": 1, "decoding": NUM_TOKENS // 2, "last": NUM_TOKENS - 1}
    if state in leaves:
        with rows.load(leaves_after=[leaves[state]] * 3) as history:
            pass
    else:
        skip = 0 if state == "waiting for kv" else 1
        rows.spoil(Order(spoil=Spoil.DELAY, shots=1, skip=skip, seconds=2.0), PREFILL)
        with rows.load(leaves_after=[None]) as history:
            verify(lambda: bool(rows.cluster.admin("leases")["leases"]), "no transfer was held")
            for request in rows.cluster.admin("requests")["requests"]:
                if request["output_tokens"] <= 1:
                    rows.cluster.admin(f"requests/{request['id']}:cancel", "POST")
    rows.check(history, also_allowed=("cancelled",))
    assert history.codes() == (set() if state in leaves else {"cancelled"})
    rows.check_nothing_is_held()
    rows.check_recovered()


def test_d5_entries_of_an_earlier_decode_node_mean_nothing(rows: Rows) -> None:
    """The registry still has, or has again, what a node said that has been started anew."""
    old = rows.cluster.nodes()["decode-0"]
    with rows.cluster.redis.client() as client:
        document = client.get("baton:node:decode-0")
    assert isinstance(document, bytes)
    assert str(json.loads(document)["incarnation"]) == old["incarnation"]
    rows.nemesis.kill("decode-0")
    with rows.cluster.redis.client() as client:
        client.set("baton:node:decode-0", document, ex=60)
        ghost = encode_entry(stale_entry(document, name="decode-9"))
        client.set("baton:node:decode-9", ghost, ex=int(4 * LEASE_SECONDS))
        client.sadd("baton:nodes", "decode-9")
        rows.nemesis.note("old entries in the registry")
        with rows.load() as history:
            pass
        assert client.delete("baton:node:decode-9") == 1
    rows.check(history)
    eventually(rows.cluster.is_whole, 60)
    assert rows.cluster.nodes()["decode-0"]["incarnation"] != old["incarnation"]
    rows.check_recovered()
