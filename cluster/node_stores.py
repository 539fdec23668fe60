"""A node's two connections to Redis: one for the registry, one for the prefix index."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.metrics import StoreMetrics
from cluster.prefix_index import PrefixIndex
from cluster.redis_client import Store
from cluster.registry import Registry

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


class NodeStores:
    """Apart, so that a slow index never delays a heartbeat. Connects with the first call."""

    def __init__(self, redis_url: str, metrics: CollectorRegistry) -> None:
        counters = StoreMetrics(metrics)
        self._registry_store = Store(redis_url, name="registry", metrics=counters)
        self._index_store = Store(redis_url, name="prefix_index", metrics=counters)
        self.registry = Registry(self._registry_store)
        self.index = PrefixIndex(self._index_store)

    async def close(self) -> None:
        await self._registry_store.close()
        await self._index_store.close()
