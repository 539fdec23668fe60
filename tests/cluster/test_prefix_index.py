from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.node import Incarnation, NodeId, NodeName
from cluster.prefix_hash import hash_blocks, root_hash
from cluster.prefix_index import (
    ENTRY_TTL_SECONDS,
    MAX_ROUND_TRIPS,
    PrefixIndex,
    PrefixSearch,
    node_tag,
)
from cluster.redis_client import MAX_LATE, Breaker, Store

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    import redis

    from baton.embedded_redis import EmbeddedRedis
    from cluster.prefix_hash import BlockHash

D0 = NodeId(NodeName("d0"), Incarnation(5))
D1 = NodeId(NodeName("d1"), Incarnation(6))
BOTH = {D0.name: D0.incarnation, D1.name: D1.incarnation}


def chain(num_blocks: int, salt: bytes = b"") -> list[BlockHash]:
    return hash_blocks(range(num_blocks * 2), 2, root_hash("model", salt))


@pytest.fixture
def with_index(redis_url: str) -> Callable[[Callable[[PrefixIndex, Store], Awaitable[None]]], None]:
    def run(scenario: Callable[[PrefixIndex, Store], Awaitable[None]]) -> None:
        async def main() -> None:
            store = Store(redis_url, name="prefix_index", breaker=Breaker(threshold=10**6))
            try:
                # Generous: a busy machine must not turn a test of results into one of speed.
                await scenario(PrefixIndex(store, lookup_timeout_seconds=10.0), store)
            finally:
                await store.close()

        asyncio.run(main())

    return run


def test_the_longest_run_is_found_for_each_node(with_index: Any) -> None:
    hashes = chain(100)

    async def scenario(index: PrefixIndex, _: Store) -> None:
        assert await index.match(hashes, BOTH) == {}
        assert await index.publish(D0, hashes[:70], [])
        assert await index.publish(D1, hashes[:3], [])
        assert await index.match(hashes, BOTH) == {"d0": 70, "d1": 3}
        assert await index.match(hashes[:50], BOTH) == {"d0": 50, "d1": 3}
        assert await index.match(chain(100, b"tenant"), BOTH) == {}
        assert await index.match([], BOTH) == {}
        assert await index.match(hashes, {}) == {}

    with_index(scenario)


def test_removed_blocks_shorten_the_run(with_index: Any) -> None:
    hashes = chain(10)

    async def scenario(index: PrefixIndex, _: Store) -> None:
        await index.publish(D0, hashes, [])
        await index.publish(D0, [], hashes[:3:-1])
        assert await index.match(hashes, BOTH) == {"d0": 4}

    with_index(scenario)


def test_another_incarnations_entries_are_not_believed(with_index: Any) -> None:
    hashes = chain(10)

    async def scenario(index: PrefixIndex, _: Store) -> None:
        await index.publish(D0, hashes, [])
        assert await index.match(hashes, {D0.name: Incarnation(6)}) == {}

    with_index(scenario)


@pytest.mark.parametrize("num_present", [0, 1, 7_300, 9_999, 10_000])
def test_ten_thousand_blocks_take_at_most_three_round_trips(
    with_index: Any, raw_redis: redis.Redis, num_present: int
) -> None:
    hashes = chain(10_000)

    async def scenario(index: PrefixIndex, _: Store) -> None:
        await index.publish(D0, hashes[:num_present], [])
        await index.publish(D1, hashes[: num_present // 2], [])
        raw_redis.config_resetstat()
        runs = await index.match(hashes, BOTH)
        expected = {"d0": num_present, "d1": num_present // 2}
        assert runs == {name: run for name, run in expected.items() if run}
        commands = raw_redis.info("commandstats")
        assert commands["cmdstat_mget"]["calls"] <= MAX_ROUND_TRIPS
        of_keys = {f"cmdstat_{name}" for name in ("get", "hmget", "hget", "exists", "eval", "scan")}
        assert not set(commands) & of_keys

    with_index(scenario)


def test_entries_hold_only_hashes_and_expire(with_index: Any, raw_redis: redis.Redis) -> None:
    hashes = chain(2)

    async def scenario(index: PrefixIndex, _: Store) -> None:
        await index.publish(D0, hashes, [])
        keys: list[bytes] = sorted(raw_redis.keys())  # type: ignore[arg-type]
        assert keys == sorted(node_tag(D0) + block_hash for block_hash in hashes)
        assert all(key.startswith(b"baton:b:") and b"d0" not in key for key in keys)
        for key in keys:
            assert raw_redis.get(key) == b""
            assert 0 < raw_redis.pttl(key) <= ENTRY_TTL_SECONDS * 1000
        raw_redis.pexpire(keys[0], 10)
        await index.publish(D0, hashes, [])
        assert raw_redis.pttl(keys[0]) > 10

    with_index(scenario)


def test_a_poisoned_entry_is_a_miss(with_index: Any, raw_redis: redis.Redis) -> None:
    hashes = chain(10)

    async def scenario(index: PrefixIndex, store: Store) -> None:
        await index.publish(D0, hashes, [])
        raw_redis.delete(node_tag(D0) + hashes[4])
        raw_redis.hset(node_tag(D0) + hashes[4], "poison", "x")
        assert await index.match(hashes, BOTH) == {"d0": 4}
        assert store.is_up

    with_index(scenario)


def test_without_redis_nothing_is_found_and_nothing_is_raised() -> None:
    async def scenario() -> None:
        store = Store("unix:///nowhere.sock", name="prefix_index")
        index = PrefixIndex(store)
        for _ in range(5):
            assert await index.match(chain(3), BOTH) == {}
            assert not await index.publish(D0, chain(3), [])
        await store.close()

    asyncio.run(scenario())


def test_a_hanging_redis_costs_no_more_than_the_lookups_timeout(
    redis_url: str, embedded_redis: EmbeddedRedis
) -> None:
    async def scenario() -> None:
        store = Store(redis_url, name="prefix_index", timeout_seconds=3600.0)
        index = PrefixIndex(store, lookup_timeout_seconds=0.01)
        os.kill(embedded_redis.pid, signal.SIGSTOP)
        try:
            assert await index.match(chain(3), BOTH) == {}
            timeouts = store.metrics.calls.labels("prefix_index", "timeout")
            assert timeouts._value.get() == 1
        finally:
            os.kill(embedded_redis.pid, signal.SIGCONT)
        await store.close()

    asyncio.run(scenario())


def test_a_slow_handshake_does_not_cost_every_lookup(redis_url: str, tmp_path: Path) -> None:
    hashes = chain(3)
    real = urlsplit(redis_url)

    async def scenario() -> None:
        writer = Store(redis_url, name="prefix_index")
        await PrefixIndex(writer).publish(D0, hashes, [])
        await writer.close()
        slow = tmp_path / "slow.sock"
        connections: list[asyncio.Task[None]] = []

        async def relay(near: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
            await asyncio.sleep(0.4)  # the fault: longer than a lookup may take
            far, into = await asyncio.open_unix_connection(real.path)
            await asyncio.gather(pump(near, into), pump(far, out))

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while data := await source.read(65536):
                sink.write(data)
            sink.close()

        def accept(near: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
            connections.append(asyncio.create_task(relay(near, out)))

        server = await asyncio.start_unix_server(accept, slow)
        store = Store(redis_url.replace(real.path, str(slow)), name="prefix_index")
        index = PrefixIndex(store, lookup_timeout_seconds=0.2)
        assert await index.match(hashes, BOTH) == {}
        await asyncio.gather(*store._late)
        assert await index.match(hashes, BOTH) == {"d0": 3}
        assert store.is_up
        await store.close()
        server.close()
        await asyncio.gather(*connections, return_exceptions=True)

    asyncio.run(scenario())


class Gated:
    """A relay to the real server that holds replies back while it is shut."""

    def __init__(self, real_path: str) -> None:
        self._real_path = real_path
        self.is_open = asyncio.Event()
        self.is_open.set()
        self.num_connections = 0
        self.num_asked = 0
        self._relays: list[asyncio.Task[None]] = []
        self._writers: list[asyncio.StreamWriter] = []

    async def accept(self, near: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        far, into = await asyncio.open_unix_connection(self._real_path)
        self._writers += [into, out]
        self._relays.append(asyncio.create_task(self._requests(near, into)))
        self._relays.append(asyncio.create_task(self._replies(far, out)))

    async def _requests(self, near: asyncio.StreamReader, into: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await near.read(65536):
                self.num_asked += data.count(b"MGET")
                into.write(data)
        into.close()

    async def _replies(self, far: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await far.read(65536):
                await self.is_open.wait()
                out.write(data)
        out.close()

    async def end(self) -> None:
        """The clients have left."""
        self.is_open.set()
        await asyncio.gather(*self._relays)
        closing = (writer.wait_closed() for writer in self._writers)
        await asyncio.gather(*closing, return_exceptions=True)


@pytest.fixture
def with_gate(
    redis_url: str, tmp_path: Path
) -> Callable[[Callable[[Gated, Store], Awaitable[None]]], None]:
    """Runs a scenario with a store behind a relay."""

    def run(scenario: Callable[[Gated, Store], Awaitable[None]]) -> None:
        async def main() -> None:
            real = urlsplit(redis_url).path
            gate, path = Gated(real), tmp_path / "gated.sock"
            server = await asyncio.start_unix_server(gate.accept, path)
            url = redis_url.replace(real, str(path))
            store = Store(url, name="prefix_index", breaker=Breaker(threshold=10**6))
            try:
                await scenario(gate, store)
            finally:
                await store.close()
                server.close()
                await gate.end()

        asyncio.run(main())

    return run


def test_a_late_reply_costs_neither_a_connection_nor_a_wrong_answer(with_gate: Any) -> None:
    hashes = chain(100)

    async def scenario(gate: Gated, store: Store) -> None:
        patient = PrefixIndex(store, lookup_timeout_seconds=10.0)
        hasty = PrefixIndex(store, lookup_timeout_seconds=0.01)
        await patient.publish(D0, hashes[:70], [])
        assert gate.num_connections == 1
        for num_blocks in (10, 20, 30):
            gate.is_open.clear()
            assert await hasty.match(hashes[:num_blocks], BOTH) == {}
            (late,) = store._late
            gate.is_open.set()
            await asyncio.gather(late)
            assert await patient.match(hashes, BOTH) == {"d0": 70}
        assert gate.num_connections == 1

    with_gate(scenario)


def test_a_look_up_that_nobody_waits_for_asks_no_more(with_gate: Any) -> None:
    hashes = chain(1000)

    async def scenario(gate: Gated, store: Store) -> None:
        index = PrefixIndex(store, lookup_timeout_seconds=0.01)
        await index.publish(D0, hashes[:500], [])
        gate.is_open.clear()
        assert await index.match(hashes, BOTH) == {}
        gate.is_open.set()
        await asyncio.gather(*store._late)
        assert gate.num_asked == 1

    with_gate(scenario)


def test_a_store_that_answers_nobody_keeps_few_late_calls(with_gate: Any) -> None:
    async def scenario(gate: Gated, store: Store) -> None:
        index = PrefixIndex(store, lookup_timeout_seconds=0.01)
        await index.publish(D0, chain(3), [])
        gate.is_open.clear()
        for _ in range(MAX_LATE + 4):
            assert await index.match(chain(3), BOTH) == {}
        assert sum(not task.cancelling() for task in store._late) == MAX_LATE
        gate.is_open.set()

    with_gate(scenario)


def test_the_tags_of_two_nodes_never_mix() -> None:
    pairs = [("a", 1), ("a", 11), ("1:a", 1), ("a1", 1), ("b", 1)]
    tags = {node_tag(NodeId(NodeName(name), Incarnation(i))) for name, i in pairs}
    assert len(tags) == len(pairs)
    assert {len(tag) for tag in tags} == {16}


@given(st.data())
def test_any_run_of_any_prompt_is_found_in_three_rounds(data: st.DataObject) -> None:
    num_blocks = data.draw(st.integers(1, 200_000))
    runs = {NodeName(n): data.draw(st.integers(0, num_blocks)) for n in ("a", "b", "c")}
    search = PrefixSearch(num_blocks, list(runs))
    rounds = 0
    while probes := search.next_probes():
        rounds += 1
        assert len(probes) <= 3 * 64
        search.narrow([position < runs[name] for name, position in probes])
    assert rounds <= MAX_ROUND_TRIPS
    assert search.runs() == {name: run for name, run in runs.items() if run}


@given(st.lists(st.booleans(), min_size=1, max_size=300))
def test_holes_never_make_a_search_fail_or_exceed_what_is_there(present: list[bool]) -> None:
    search = PrefixSearch(len(present), [D0.name])
    while probes := search.next_probes():
        search.narrow([present[position] for _, position in probes])
    run = search.runs().get(D0.name, 0)
    assert run == 0 or present[run - 1]
