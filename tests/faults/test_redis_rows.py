"""Rows R1 to R6 of the fault matrix: Redis dies, hangs, lies, is full, and mixes up its replies.
What it holds are hints: a request never fails, and never gets another token, for want of them."""

from __future__ import annotations

import os
import random
import signal
import time
from typing import TYPE_CHECKING

import pytest

from tests.e2e.cluster_process import eventually
from tests.faults.asks import Ask, draw_prompt
from tests.faults.cluster_rows import SEED
from tests.faults.nemesis import process_state, verify
from tests.faults.proxy import Faults

if TYPE_CHECKING:
    from collections.abc import Iterator

    import redis

    from tests.faults.cluster_rows import Rows
    from tests.faults.history import Answer

pytestmark = pytest.mark.faults
GATEWAYS = ("gateway", "gateway-1")
CALLS, UP = "baton_store_calls_total", "baton_store_up"
REGISTRY_TTL_SECONDS = 5.0
INDEX_KEYS = "baton:b:*"
MIB = 1 << 20


@pytest.fixture
def client(cached: Rows) -> Iterator[redis.Redis]:
    """Straight to Redis, past the proxy."""
    with cached.cluster.redis.client() as made:
        yield made


def calls(rows: Rows, *outcomes: str) -> float:
    names = [*rows.cluster.node_names, *GATEWAYS]
    return sum(rows.counted(CALLS, names, outcome=outcome) for outcome in outcomes)


def goes_unnoticed(rows: Rows) -> None:
    """Clients get all of their tokens."""
    with rows.load() as history:
        pass
    rows.check(history)
    assert history.codes() == set()


def test_r1_redis_dies_and_comes_back_empty(cached: Rows, client: redis.Redis) -> None:
    eventually(lambda: bool(client.keys(INDEX_KEYS)))
    with cached.load() as history:
        history.wait_for_tokens(1)
        cached.nemesis.kill("redis")
        cached.cluster.redis.reap()
        cached.cluster.redis.start()
    cached.check(history)
    assert history.codes() == set()
    goes_unnoticed(cached)
    eventually(lambda: len(client.keys(INDEX_KEYS)) > 0, 60)  # nodes publish all they have again
    cached.check_recovered()


def test_r2_redis_hangs_for_longer_than_its_entries_live(cached: Rows) -> None:
    failed = calls(cached, "timeout")
    pid = cached.nemesis.stop("redis")
    with cached.load() as history:
        pass
    goes_unnoticed(cached)
    verify(lambda: calls(cached, "timeout") > failed, "no call has timed out")
    verify(lambda: cached.counted(UP, GATEWAYS, store="registry") < len(GATEWAYS), "breakers shut")
    time.sleep(REGISTRY_TTL_SECONDS)  # how long the fault lasts
    cached.nemesis.resume(pid)
    goes_unnoticed(cached)
    cached.check(history)
    assert history.codes() == set()
    cached.check_recovered()


def test_r2_redis_is_slow(cached: Rows) -> None:
    proxy = cached.cluster.redis_proxy
    proxy.faults_down = Faults(delay_seconds=0.5)
    delayed = proxy.counters["delayed"]
    goes_unnoticed(cached)
    assert proxy.counters["delayed"] > delayed
    cached.check_recovered()


def test_r3_redis_heals_with_old_data(cached: Rows, client: redis.Redis) -> None:
    """It says that nodes hold blocks which they have long dropped."""
    nodes = cached.cluster.node_names
    # Who could not say what it dropped leaves that to the entries' end.
    eventually(lambda: cached.counted(UP, nodes, store="prefix_index") == len(nodes))
    goes_unnoticed(cached)
    eventually(lambda: bool(client.keys(INDEX_KEYS)))
    old = client.keys(INDEX_KEYS)
    proxy = cached.cluster.redis_proxy
    cached.cluster.admin("prefix-cache:reset", "POST")
    eventually(lambda: not client.exists(*old))
    held = proxy.counters["blackholed"]
    proxy.faults_up = proxy.faults_down = Faults(is_blackholed=True)
    verify(lambda: proxy.counters["blackholed"] > held, "nothing was held")
    for key in old:
        client.set(key, b"1", ex=120)
    goes_unnoticed(cached)
    proxy.heal()
    cached.nemesis.note(f"{len(old)} old entries of the index are back")
    goes_unnoticed(cached)
    goes_unnoticed(cached)
    client.delete(*old)
    cached.check_recovered()


@pytest.mark.parametrize("limit", ["full", "read-only"])
def test_r4_redis_takes_no_writes(cached: Rows, client: redis.Redis, limit: str) -> None:
    failed = calls(cached, "error")
    name, value, usual = {
        "full": ("maxmemory", "1mb", "0"),
        "read-only": ("min-replicas-to-write", "1", "0"),
    }[limit]
    client.config_set("maxmemory-policy", "noeviction")
    client.config_set(name, value)
    try:
        verify(lambda: calls(cached, "error") > failed, "no write was refused")
        cached.nemesis.note(f"redis {limit}")
        goes_unnoticed(cached)
        time.sleep(REGISTRY_TTL_SECONDS)  # the entries of the registry run out meanwhile
        goes_unnoticed(cached)
    finally:
        client.config_set(name, usual)
    written = calls(cached, "ok")
    eventually(lambda: calls(cached, "ok") > written)
    cached.check_recovered()


def test_r5_replies_that_come_late_or_twice_are_nobody_elses(cached: Rows) -> None:
    """Delays beyond the patience of a lookup cancel calls at random; first replies come twice."""
    proxy = cached.cluster.redis_proxy
    before = proxy.counters.copy()
    proxy.faults_down = Faults(reset_after=0)  # first replies come on new connections
    verify(lambda: proxy.counters["reset"] > before["reset"], "no connection was cut")
    proxy.faults_down = Faults(delay_seconds=0.005, jitter_seconds=0.1, duplicate_at=0)
    for _ in range(2):
        goes_unnoticed(cached)
    assert proxy.counters["delayed"] > before["delayed"]
    verify(lambda: proxy.counters["duplicated"] > before["duplicated"], "no reply came twice")
    cached.check_recovered()


def test_r6_poison_in_redis_is_a_miss(cached: Rows, client: redis.Redis) -> None:
    poisoned = "baton_store_poisoned_entries_total"
    before = cached.counted(poisoned, GATEWAYS)
    draw = random.Random(SEED)
    for number, value in enumerate((b"", b"{}", b"[" * 100_000, draw.randbytes(8 * MIB))):
        client.set(f"baton:node:poison-{number}", value, ex=120)
        client.sadd("baton:nodes", f"poison-{number}")
    client.rpush("baton:node:poison-list", "x")
    client.sadd("baton:nodes", "poison-list", b"\xff\xfe", "x" * 10_000)
    keys = client.keys(INDEX_KEYS)
    for key in keys:  # of another type
        client.delete(key)
        client.rpush(key, "x")
    verify(lambda: cached.counted(poisoned, GATEWAYS) > before, "no poison was met")
    cached.nemesis.note(f"5 poisoned nodes and {len(keys)} poisoned blocks")
    goes_unnoticed(cached)
    client.delete(*client.keys("baton:node:poison-*"), *keys)
    client.srem(
        "baton:nodes", *[name for name in client.smembers("baton:nodes") if b"-" not in name]
    )
    cached.check_recovered()


def test_k5_any_part_of_a_prompt_may_be_held_already(cached: Rows) -> None:
    """Prompts below a block, at its end, one beyond; then the same with more behind them, so that
    each node holds 0 to all blocks of what comes. The oracle is the same without a cache."""
    draw = random.Random(SEED + 5)
    stem = draw_prompt(draw, 200, 200)
    lengths = (1, 15, 16, 17, 31, 32, 33, 127, 128, 129, 160, 200)
    asks = [
        Ask(number=number, prompt=stem[:length], num_tokens=16)
        for number, length in enumerate(lengths)
    ]
    oracle: dict[int, Answer] = {}
    for ask in asks:
        cached.cluster.admin("prefix-cache:reset", "POST")
        oracle |= cached.undisturbed([ask])
    cached.cluster.admin("prefix-cache:reset", "POST")
    order = [*asks]
    draw.shuffle(order)
    hits = cached.counted("baton_cached_tokens_total", cached.cluster.node_names)
    for ask in order:
        with cached.load([ask]) as history:
            pass
        cached.check(history, oracle)
        assert history.codes() == set()
    assert cached.counted("baton_cached_tokens_total", cached.cluster.node_names) > hits
    cached.check_recovered()


def test_a_redis_that_was_not_stopped_is_a_miss_that_shows(cached: Rows) -> None:
    pid = cached.cluster.child("redis")
    os.kill(pid, signal.SIGCONT)
    with pytest.raises(AssertionError, match="did not stand still"):
        cached.nemesis.resume(pid)
    assert process_state(pid) != "T"
