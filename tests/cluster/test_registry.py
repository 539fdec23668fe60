from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from cluster.node import NodeId, NodeInfo, NodeLoad, NodeState
from cluster.redis_client import Store, StoreUnavailable
from cluster.registry import (
    MAX_ENTRY_BYTES,
    TTL_SECONDS,
    Heartbeat,
    PoisonedEntry,
    Registry,
    decode_entry,
    encode_entry,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import redis


@pytest.fixture
def with_registry(redis_url: str) -> Callable[[Callable[[Registry, Store], Awaitable[None]]], None]:
    """Runs an async scenario on a registry, closing it in the same event loop."""

    def run(scenario: Callable[[Registry, Store], Awaitable[None]]) -> None:
        async def main() -> None:
            store = Store(redis_url, name="registry")
            try:
                await scenario(Registry(store), store)
            finally:
                await store.close()

        asyncio.run(main())

    return run


def poisoned(store: Store) -> float:
    value: float = store.metrics.poisoned.labels("registry")._value.get()
    return value


def test_nodes_see_each_other_until_they_withdraw(
    with_registry: Any, make_node: Callable[..., NodeInfo]
) -> None:
    a, b = make_node("a"), make_node("b", 2, load=NodeLoad(num_running=3))

    async def scenario(registry: Registry, _: Store) -> None:
        assert await registry.nodes() == []
        await registry.announce(b)
        await registry.announce(a)
        assert await registry.nodes() == [a, b]
        await registry.withdraw(a.id)
        assert await registry.nodes() == [b]

    with_registry(scenario)


def test_an_entry_lives_for_its_ttl_and_a_heartbeat_renews_it(
    with_registry: Any, raw_redis: redis.Redis, make_node: Callable[..., NodeInfo]
) -> None:
    node = make_node("a")

    async def scenario(registry: Registry, _: Store) -> None:
        await registry.announce(node)
        assert 0 < raw_redis.pttl("baton:node:a") <= TTL_SECONDS * 1000
        raw_redis.pexpire("baton:node:a", 1500)
        draining = replace(node, state=NodeState.DRAINING)
        assert await registry.heartbeat(draining) is Heartbeat.RENEWED
        assert raw_redis.pttl("baton:node:a") > 1500
        assert await registry.nodes() == [draining]

    with_registry(scenario)


def test_a_heartbeat_restores_what_an_emptied_redis_forgot(
    with_registry: Any, raw_redis: redis.Redis, make_node: Callable[..., NodeInfo]
) -> None:
    node = make_node("a")

    async def scenario(registry: Registry, _: Store) -> None:
        await registry.announce(node)
        raw_redis.flushall()
        assert await registry.nodes() == []
        assert await registry.heartbeat(node) is Heartbeat.RESTORED
        assert await registry.nodes() == [node]

    with_registry(scenario)


def test_a_replaced_incarnation_is_told_and_changes_nothing(
    with_registry: Any, make_node: Callable[..., NodeInfo]
) -> None:
    old, new = make_node("a", 1), make_node("a", 2)

    async def scenario(registry: Registry, _: Store) -> None:
        await registry.announce(old)
        await registry.announce(new)
        assert await registry.heartbeat(old) is Heartbeat.REPLACED
        await registry.withdraw(old.id)
        assert await registry.nodes() == [new]

    with_registry(scenario)


def test_a_predecessors_entry_that_is_back_replaces_nobody(
    with_registry: Any, raw_redis: redis.Redis, make_node: Callable[..., NodeInfo]
) -> None:
    """As after a fail-over to a Redis that had not heard of the announcement."""
    old, new = make_node("a", 1), make_node("a", 2)

    async def scenario(registry: Registry, store: Store) -> None:
        await Registry(store).announce(old)
        await registry.announce(new)
        raw_redis.set("baton:node:a", encode_entry(old))
        assert await registry.heartbeat(new) is Heartbeat.RESTORED
        assert await registry.heartbeat(new) is Heartbeat.RENEWED
        assert await registry.nodes() == [new]

    with_registry(scenario)


def test_a_name_taken_between_read_and_write_is_not_overwritten(
    with_registry: Any,
    raw_redis: redis.Redis,
    make_node: Callable[..., NodeInfo],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old, new = make_node("a", 1), make_node("a", 2)

    async def scenario(registry: Registry, _: Store) -> None:
        await registry.announce(old)
        queue_write = registry._queue_write

        def overtaken(pipe: Any, name: str, entry: bytes) -> None:
            raw_redis.set("baton:node:a", encode_entry(new))
            queue_write(pipe, name, entry)

        monkeypatch.setattr(registry, "_queue_write", overtaken)
        assert await registry.heartbeat(old) is Heartbeat.REPLACED
        assert await registry.nodes() == [new]

    with_registry(scenario)


def test_an_entry_that_expires_between_read_and_write_has_no_other_owner(
    with_registry: Any,
    raw_redis: redis.Redis,
    make_node: Callable[..., NodeInfo],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As after a standstill of Redis that was longer than entries live: a node that took this for
    its replacement would end, and all nodes at once."""
    node = make_node("a", 1)

    async def scenario(registry: Registry, _: Store) -> None:
        await registry.announce(node)
        queue_write = registry._queue_write

        def expired(pipe: Any, name: str, entry: bytes) -> None:
            raw_redis.delete("baton:node:a")
            queue_write(pipe, name, entry)

        monkeypatch.setattr(registry, "_queue_write", expired)
        assert await registry.heartbeat(node) is Heartbeat.RESTORED
        assert await registry.nodes() == [node]

    with_registry(scenario)


def test_announcing_forgets_names_whose_entry_expired(
    with_registry: Any, raw_redis: redis.Redis, make_node: Callable[..., NodeInfo]
) -> None:
    async def scenario(registry: Registry, _: Store) -> None:
        await registry.announce(make_node("dead"))
        raw_redis.delete("baton:node:dead")
        await registry.announce(make_node("a"))
        assert raw_redis.smembers("baton:nodes") == {b"a"}

    with_registry(scenario)


def test_poisoned_entries_are_skipped_and_counted(
    with_registry: Any, raw_redis: redis.Redis, make_node: Callable[..., NodeInfo]
) -> None:
    good = make_node("good")
    entry = encode_entry(good)

    async def scenario(registry: Registry, store: Store) -> None:
        await registry.announce(good)
        raw_redis.set("baton:node:text", "not json")
        raw_redis.set("baton:node:long", encode_entry(make_node("long")).ljust(10**6))
        raw_redis.hset("baton:node:typed", "a", "b")
        raw_redis.set("baton:node:other-name", entry)
        for name in ("text", "long", "typed", "other-name", "\udcff", "absent"):
            raw_redis.sadd("baton:nodes", name.encode(errors="surrogateescape"))
        assert await registry.nodes() == [good]
        assert poisoned(store) == 4

    with_registry(scenario)


def test_a_poisoned_entry_under_our_name_is_written_over(
    with_registry: Any, raw_redis: redis.Redis, make_node: Callable[..., NodeInfo]
) -> None:
    node = make_node("a")

    async def scenario(registry: Registry, _: Store) -> None:
        raw_redis.hset("baton:node:a", "x", "y")
        assert await registry.heartbeat(node) is Heartbeat.RESTORED
        assert await registry.nodes() == [node]

    with_registry(scenario)


@pytest.mark.parametrize("write", ["announce", "heartbeat"])
def test_a_names_key_of_another_type_hides_nodes_until_one_has_written_it(
    with_registry: Any, raw_redis: redis.Redis, make_node: Callable[..., NodeInfo], write: str
) -> None:
    node = make_node("a")
    raw_redis.set("baton:nodes", "poison")

    async def scenario(registry: Registry, store: Store) -> None:
        assert await registry.nodes() == []
        await getattr(registry, write)(node)
        await registry.heartbeat(node)
        assert await registry.nodes() == [node]
        assert store.is_up

    with_registry(scenario)


@pytest.mark.parametrize("reply", [b":5\r\n", b"$3\r\nabc\r\n", b"*1\r\n*1\r\n:1\r\n", b"$-1\r\n"])
def test_replies_of_other_types_are_a_typed_error(reply: bytes) -> None:
    """As behind a proxy that mixes replies up. A gateway ended when its poll raised another."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            if line.rstrip().upper() in (b"CLIENT", b"SELECT"):
                writer.write(b"+OK\r\n")
            elif line.startswith(b"SRANDMEMBER"):
                writer.write(reply)
        writer.close()

    async def scenario() -> None:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            store = Store(f"redis://127.0.0.1:{port}", name="registry")
            with pytest.raises(StoreUnavailable):
                await Registry(store).nodes()
            await store.close()

    asyncio.run(scenario())


def test_a_dead_redis_is_a_typed_error(make_node: Callable[..., NodeInfo]) -> None:
    async def scenario() -> None:
        store = Store("unix:///nowhere.sock", name="registry")
        registry = Registry(store)
        node = make_node("a")
        for call in (registry.nodes(), registry.announce(node), registry.heartbeat(node)):
            with pytest.raises(StoreUnavailable):
                await call
        await store.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", 2),
        ("name", "../etc"),
        ("name", ""),
        ("name", 3),
        ("incarnation", 0),
        ("incarnation", True),
        ("incarnation", "1"),
        ("incarnation", 2**63),
        ("role", "boss"),
        ("role", None),
        ("state", "happy"),
        ("grpc_address", "no-port"),
        ("grpc_address", "host:1/../x"),
        ("metrics_address", 5),
        ("model_name", "a\nb"),
        ("model_name", "x" * 257),
        ("compatibility_hash", ""),
        ("block_size", 0),
        ("block_size", 1.5),
        ("max_model_len", -1),
        ("transports", "shm"),
        ("transports", [1]),
        ("transports", ["a"] * 17),
        ("load", None),
        ("load", {"num_running": -1}),
        ("load", {"num_running": 2**60}),
    ],
)
def test_no_field_is_believed(
    field: str, value: object, make_node: Callable[..., NodeInfo]
) -> None:
    document = json.loads(encode_entry(make_node("a")))
    assert decode_entry(json.dumps(document).encode()) == make_node("a")
    document[field] = value
    with pytest.raises(PoisonedEntry):
        decode_entry(json.dumps(document).encode())


@pytest.mark.parametrize("entry", [b"", b"[]", b"3", b"\xff", b"[" * 4000, b"x" * 5000])
def test_no_document_is_believed(entry: bytes) -> None:
    with pytest.raises(PoisonedEntry):
        decode_entry(entry)


def test_an_entry_that_readers_would_refuse_is_not_written(
    make_node: Callable[..., NodeInfo],
) -> None:
    with pytest.raises(PoisonedEntry):
        encode_entry(replace(make_node("a"), model_name="x" * MAX_ENTRY_BYTES))


def test_fields_of_later_versions_are_ignored(make_node: Callable[..., NodeInfo]) -> None:
    document = json.loads(encode_entry(make_node("a")))
    document["zone"] = "b"
    document["load"]["num_later"] = 5
    assert decode_entry(json.dumps(document).encode()).id == NodeId(make_node("a").id.name, 1)  # type: ignore[arg-type]
