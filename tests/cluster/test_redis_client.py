from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING

import pytest
from prometheus_client import CollectorRegistry

from cluster.errors import ConfigError
from cluster.metrics import StoreMetrics
from cluster.redis_client import (
    MAX_AT_ONCE,
    MAX_WAITING,
    Breaker,
    Store,
    StoreUnavailable,
    check_redis_url,
)

if TYPE_CHECKING:
    import redis
    import redis.asyncio as aioredis

    from tests.cluster.conftest import ManualClock

DEAD_URL = "unix:///nowhere/redis.sock"


async def ping(client: aioredis.Redis) -> bool:
    return bool(await client.ping())


def test_the_breaker_opens_after_failures_in_a_row_only() -> None:
    breaker = Breaker(threshold=2)
    breaker.failed(0.0)
    breaker.succeeded()
    breaker.failed(0.0)
    assert not breaker.is_open
    breaker.failed(0.0)
    assert breaker.is_open


def test_an_open_breaker_lets_one_probe_through_per_pause() -> None:
    breaker = Breaker(threshold=1, first_pause_seconds=1.0, max_pause_seconds=3.0)
    breaker.failed(10.0)
    assert not breaker.allows(10.9)
    assert breaker.allows(11.0)
    assert not breaker.allows(11.0)


def test_pauses_double_to_their_bound_and_success_closes() -> None:
    breaker = Breaker(threshold=1, first_pause_seconds=1.0, max_pause_seconds=3.0)
    breaker.failed(0.0)
    now = 0.0
    for pause in (1.0, 2.0, 3.0, 3.0):
        assert not breaker.allows(now + pause - 0.01)
        now += pause
        assert breaker.allows(now)
        breaker.failed(now)
    assert breaker.allows(now + 3.0)
    breaker.succeeded()
    assert not breaker.is_open
    breaker.failed(now)
    assert breaker.allows(now + 1.0)


def test_an_abandoned_probe_does_not_lock_the_breaker() -> None:
    breaker = Breaker(threshold=1, first_pause_seconds=1.0)
    breaker.failed(0.0)
    assert breaker.allows(1.0)
    breaker.abandoned()
    assert breaker.allows(1.0)


def test_a_dead_store_is_refused_at_once_and_tried_again_later(clock: ManualClock) -> None:
    registry = CollectorRegistry()
    store = Store(
        DEAD_URL,
        name="registry",
        metrics=StoreMetrics(registry),
        breaker=Breaker(threshold=2, first_pause_seconds=1.0),
        clock=clock,
    )

    async def scenario() -> None:
        for _ in range(5):
            with pytest.raises(StoreUnavailable):
                await store.call(ping)
        assert not store.is_up
        clock.advance(1.0)
        with pytest.raises(StoreUnavailable):
            await store.call(ping)
        await store.close()

    asyncio.run(scenario())

    def calls(outcome: str) -> float | None:
        labels = {"store": "registry", "outcome": outcome}
        return registry.get_sample_value("baton_store_calls_total", labels)

    assert calls("error") == 3
    assert calls("refused") == 3
    assert registry.get_sample_value("baton_store_up", {"store": "registry"}) == 0


def test_a_store_that_hangs_costs_the_timeout_and_one_that_heals_is_used_again(
    redis_url: str, raw_redis: redis.Redis, clock: ManualClock
) -> None:
    breaker = Breaker(threshold=1, first_pause_seconds=1.0)
    store = Store(redis_url, name="registry", breaker=breaker, clock=clock)

    async def hang(client: aioredis.Redis) -> object:
        return await client.blpop(["never"], timeout=0)

    async def scenario() -> None:
        with pytest.raises(StoreUnavailable, match="in time"):
            await store.call(hang, timeout_seconds=0.02)
        with pytest.raises(StoreUnavailable, match="tried again"):
            await store.call(ping)
        clock.advance(1.0)
        assert await store.call(ping)
        assert store.is_up
        await store.close()

    asyncio.run(scenario())


def test_a_burst_of_calls_takes_turns_on_few_connections(redis_url: str) -> None:
    """More calls than connections are no trouble of Redis."""
    store = Store(redis_url, name="index", breaker=Breaker(threshold=1))

    async def scenario() -> None:
        answers = await asyncio.gather(*(store.call(ping) for _ in range(MAX_WAITING)))
        assert answers == [True] * MAX_WAITING
        await store.close()

    asyncio.run(scenario())


def test_no_call_waits_behind_too_many(redis_url: str) -> None:
    store = Store(redis_url, name="index", breaker=Breaker(threshold=1))

    async def scenario() -> None:
        free = asyncio.Event()

        async def held(_: aioredis.Redis) -> None:
            await free.wait()

        waiting = [asyncio.create_task(store.call(held)) for _ in range(MAX_AT_ONCE + MAX_WAITING)]
        await asyncio.sleep(0)
        with pytest.raises(StoreUnavailable, match="Too many"):
            await store.call(ping)
        free.set()
        await asyncio.gather(*waiting)
        assert store.is_up
        await store.close()

    asyncio.run(scenario())


def test_a_busy_loop_is_not_taken_for_a_slow_store(redis_url: str) -> None:
    """Each time somebody looks at the clock, more time has passed than a look-up has."""
    store = Store(redis_url, name="index", breaker=Breaker(threshold=1))

    async def three_round_trips(_: aioredis.Redis) -> bool:
        for _round in range(3):
            await asyncio.sleep(0)
        return True

    async def scenario() -> None:
        loop, seconds = asyncio.get_running_loop(), itertools.count(step=0.02)
        time = loop.time
        loop.time = lambda: time() + next(seconds)  # type: ignore[method-assign]
        assert await store.call(three_round_trips, timeout_seconds=0.01)
        await store.close()

    asyncio.run(scenario())


def test_a_reply_that_makes_no_sense_is_a_failure_and_the_next_call_may_probe(
    redis_url: str, clock: ManualClock
) -> None:
    breaker = Breaker(threshold=1, first_pause_seconds=1.0)
    store = Store(redis_url, name="registry", breaker=breaker, clock=clock)

    async def misread(client: aioredis.Redis) -> list[bytes]:
        return list(await client.dbsize())  # type: ignore[call-overload,no-any-return]

    async def scenario() -> None:
        for pause in (1.0, 2.0):
            with pytest.raises(StoreUnavailable):
                await store.call(misread)
            assert not store.is_up
            clock.advance(pause)
        assert await store.call(ping)
        await store.close()

    asyncio.run(scenario())


def test_a_server_that_takes_no_writes_any_more_is_left(
    redis_url: str, raw_redis: redis.Redis
) -> None:
    """After a fail-over its name may lead to another, but connections to it go on."""
    store = Store(redis_url, name="registry", breaker=Breaker(threshold=10))

    async def connection(client: aioredis.Redis) -> int:
        return int(await client.client_id())

    async def scenario() -> None:
        before = await store.call(connection)
        raw_redis.replicaof("127.0.0.1", 1)
        with pytest.raises(StoreUnavailable):
            await store.call(lambda client: client.set("a", 1))
        assert await store.call(connection) != before
        await store.close()

    try:
        asyncio.run(scenario())
    finally:
        raw_redis.replicaof("NO", "ONE")


def test_a_cancelled_calls_reply_never_answers_another_call(redis_url: str) -> None:
    store = Store(redis_url, name="index", breaker=Breaker(threshold=10**6))

    async def get(key: int) -> bytes | None:
        async def read(client: aioredis.Redis) -> bytes | None:
            async with client.pipeline(transaction=False) as pipe:
                pipe.get(f"k{key}")
                found: list[bytes | None] = await pipe.execute()
            return found[0]

        return await store.call(read)

    async def scenario() -> None:
        for key in range(50):
            await store.call(lambda client, k=key: client.set(f"k{k}", f"v{k}"))  # type: ignore[misc]
        for turn in range(300):
            doomed = asyncio.create_task(get(turn % 50))
            for _ in range(turn % 7):
                await asyncio.sleep(0)
            doomed.cancel()
            other = (turn + 1) % 50
            assert await get(other) == f"v{other}".encode()
            await asyncio.gather(doomed, return_exceptions=True)
        await store.close()

    asyncio.run(scenario())


def test_cancelling_is_not_swallowed_nor_counted_as_a_failure(redis_url: str) -> None:
    store = Store(redis_url, name="registry", breaker=Breaker(threshold=1))

    async def scenario() -> None:
        task = asyncio.create_task(store.call(lambda client: client.blpop(["never"], timeout=0)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert store.is_up
        await store.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("num_turns", range(6))
def test_a_call_cancelled_before_its_end_never_goes_on(redis_url: str, num_turns: int) -> None:
    store = Store(redis_url, name="registry")

    async def scenario() -> None:
        await store.call(ping)
        task = asyncio.create_task(store.call(ping))
        for _ in range(num_turns):
            await asyncio.sleep(0)
        was_pending = task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled() == was_pending
        await store.close()

    asyncio.run(scenario())


def test_a_cancelled_probe_leaves_the_store_open_to_the_next(
    redis_url: str, raw_redis: redis.Redis, clock: ManualClock
) -> None:
    breaker = Breaker(threshold=1, first_pause_seconds=1.0)
    store = Store(redis_url, name="registry", breaker=breaker, clock=clock)

    async def scenario() -> None:
        with pytest.raises(StoreUnavailable):
            await store.call(lambda client: client.incr("text"))
        clock.advance(1.0)
        probe = asyncio.create_task(store.call(ping))
        await asyncio.sleep(0)
        probe.cancel()
        await asyncio.gather(probe, return_exceptions=True)
        assert probe.cancelled()
        assert await store.call(ping)
        await store.close()

    raw_redis.set("text", "not a number")
    asyncio.run(scenario())


@pytest.mark.parametrize(
    "url",
    [
        *("", "http://x", "localhost:6379", "redis://h:port/0", "redis://[::1"),
        *("redis://h?no_such=1", "redis://h?socket_timeout=x", "rediss://h?ssl_cert_reqs=x"),
    ],
)
def test_a_url_of_no_known_form_is_a_config_error(url: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check_redis_url(url)
    assert raised.value.param == "redis_url"


@pytest.mark.parametrize(
    "url", ["redis://:a@h:1/0", "rediss://h", "unix:///redis.sock?db=0&password=a"]
)
def test_a_url_of_a_known_form_is_taken(url: str) -> None:
    check_redis_url(url)
