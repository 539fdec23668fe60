"""A real redis-server for the room's tests, emptied before each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import redis
from hypothesis import settings

from baton.embedded_redis import EmbeddedRedis
from cluster.node import Incarnation, NodeId, NodeInfo, NodeLoad, NodeName, NodeRole, NodeState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


# A busy machine must not turn a test of results into one of speed.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


class ManualClock:
    """A clock that moves when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture(scope="session")
def embedded_redis() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture
def raw_redis(embedded_redis: EmbeddedRedis) -> Iterator[redis.Redis]:
    """A plain client, to look into the server and to put poison there."""
    with redis.Redis.from_url(embedded_redis.url) as client:
        client.flushall()
        yield client


@pytest.fixture
def redis_url(embedded_redis: EmbeddedRedis, raw_redis: redis.Redis) -> str:
    return embedded_redis.url


def node_info(
    name: str = "a",
    incarnation: int = 1,
    *,
    role: NodeRole = NodeRole.PREFILL,
    state: NodeState = NodeState.READY,
    load: NodeLoad | None = None,
    compatibility_hash: str = "abc",
) -> NodeInfo:
    return NodeInfo(
        id=NodeId(NodeName(name), Incarnation(incarnation)),
        role=role,
        state=state,
        grpc_address="127.0.0.1:9100",
        metrics_address="",
        model_name="pocket",
        compatibility_hash=compatibility_hash,
        block_size=16,
        max_model_len=4096,
        transports=("shm",),
        load=load or NodeLoad(),
    )


@pytest.fixture
def make_node() -> Callable[..., NodeInfo]:
    return node_info
