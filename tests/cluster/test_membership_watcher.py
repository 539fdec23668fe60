from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from cluster.membership import MISSING_GRACE_SECONDS, ClusterView
from cluster.membership_events import SessionLost
from cluster.membership_watcher import MembershipWatcher
from cluster.redis_client import Breaker, Store
from cluster.registry import Registry
from tests.cluster.conftest import ManualClock, node_info

if TYPE_CHECKING:
    import redis

    from cluster.node import NodeId

NODE = node_info("a")


class Watched:
    """A watcher with a record of what it told."""

    def __init__(self, url: str, clock: ManualClock) -> None:
        self.store = Store(url, name="registry", breaker=Breaker(threshold=1), clock=clock)
        self.registry = Registry(self.store)
        self.views: list[ClusterView] = []
        self.gone: list[tuple[NodeId, str]] = []
        self.watcher = MembershipWatcher(
            self.registry,
            on_change=self.views.append,
            on_gone=lambda node, why: self.gone.append((node, why)),
            clock=clock,
        )


def test_changes_in_the_registry_reach_the_view(
    redis_url: str, raw_redis: redis.Redis, clock: ManualClock
) -> None:
    async def scenario() -> None:
        watched = Watched(redis_url, clock)
        assert await watched.watcher.poll()
        assert watched.views == []
        await watched.registry.announce(NODE)
        await watched.watcher.poll()
        await watched.watcher.poll()
        assert [list(view.nodes) for view in watched.views] == [["a"]]
        raw_redis.flushall()
        await watched.watcher.poll()
        assert list(watched.watcher.view.nodes) == ["a"]
        clock.advance(MISSING_GRACE_SECONDS)
        await watched.watcher.poll()
        assert watched.watcher.view.nodes == {}
        assert watched.gone == [(NODE.id, "expired")]
        await watched.store.close()

    asyncio.run(scenario())


def test_a_dead_registry_keeps_the_last_view_and_own_observations_still_count(
    redis_url: str, raw_redis: redis.Redis, clock: ManualClock
) -> None:
    async def scenario() -> None:
        watched = Watched(redis_url, clock)
        await watched.registry.announce(NODE)
        await watched.watcher.poll()
        password = str(raw_redis.config_get("requirepass")["requirepass"])
        raw_redis.config_set("requirepass", "changed")
        try:
            raw_redis.client_kill_filter(_type="normal", skipme=True)
            for _ in range(5):
                clock.advance(60.0)
                assert not await watched.watcher.poll()
            assert list(watched.watcher.view.nodes) == ["a"]
            watched.watcher.observe(SessionLost(NODE.id))
            assert watched.watcher.view.prefill == ()
        finally:
            raw_redis.config_set("requirepass", password)
        clock.advance(60.0)
        raw_redis.delete("baton:node:a")
        assert await watched.watcher.poll()
        assert watched.gone == []
        await watched.registry.heartbeat(NODE)
        clock.advance(MISSING_GRACE_SECONDS)
        assert await watched.watcher.poll()
        assert watched.gone == []
        await watched.store.close()

    asyncio.run(scenario())


def test_it_polls_until_cancelled(redis_url: str, clock: ManualClock) -> None:
    async def scenario() -> None:
        watched = Watched(redis_url, clock)
        changed = asyncio.Event()
        watcher = MembershipWatcher(
            watched.registry, on_change=lambda _: changed.set(), clock=clock, poll_seconds=0.001
        )
        running = asyncio.create_task(watcher.run())
        await asyncio.sleep(0)
        await watched.registry.announce(NODE)
        await changed.wait()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert running.cancelled()
        await watched.store.close()

    asyncio.run(scenario())
