"""A node's membership of the cluster, from first heartbeat to withdrawal.

Life of a member
    STARTING  built; nobody knows it yet
    READY     announced; takes work
    CORDONED  an operator's order: takes no new work, goes on with what it has
    DRAINING  the same, and on its way out: once idle it is
    DRAINED   nothing runs here any more; the process may end
Each heartbeat carries the state and the load, and tells the prefix index what was cached and
dropped since the last one. Redis down is no reason to stop: the next heartbeat tries again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cluster.codec import encode_description, encode_load
from cluster.errors import ConfigError, InvalidRequest
from cluster.node import NodeInfo, NodeLoad, NodeState
from cluster.options import option
from cluster.proto import node_pb2 as pb
from cluster.redis_client import StoreUnavailable
from cluster.registry import HEARTBEAT_SECONDS, Heartbeat
from cluster.version import VERSION

if TYPE_CHECKING:
    from cluster.prefix_hash import BlockHash
    from cluster.prefix_index import PrefixIndex
    from cluster.registry import Registry

logger = logging.getLogger(__name__)
DRAIN_POLL_SECONDS = 0.05

# Hashes stored (parents first) and removed (leaves first) since the last call.
CacheChanges = Callable[[], Awaitable[tuple[Sequence["BlockHash"], Sequence["BlockHash"]]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberConfig:
    """How a node takes part in a cluster."""

    node_name: str = option(
        "", help="Name in the registry, kept over restarts. Default: role, host and port."
    )
    host: str = option("127.0.0.1", help="Address the node's control plane (gRPC) listens on.")
    port: int = option(9100, help="Port of the control plane; 0 takes a free one.")
    advertise_host: str = option(
        "", help="Address at which others reach this node. Default: --host.", advanced=True
    )
    metrics_port: int = option(9400, help="Port of Prometheus metrics; 0 takes a free one.")
    redis_url: str = option(
        "redis://127.0.0.1:6379/0", help="Redis with the registry and prefix index.", secret=True
    )
    shutdown_timeout: float = option(
        60.0, help="Seconds that SIGTERM gives running requests before they are ended."
    )
    log_level: str = option(
        "info", help="Least severe log line shown.", choices=("debug", "info", "warning", "error")
    )

    def __post_init__(self) -> None:
        for name in ("port", "metrics_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise ConfigError("must be a port number", param=name)
        if self.shutdown_timeout < 0:
            raise ConfigError("must not be negative", param="shutdown_timeout")

    @property
    def reachable_host(self) -> str:
        return self.advertise_host or self.host


class Member:
    """Announces one node and keeps the announcement true. Lives on the event loop."""

    def __init__(
        self,
        info: NodeInfo,
        registry: Registry,
        index: PrefixIndex,
        *,
        load: Callable[[], NodeLoad],
        transports: Callable[[], tuple[str, ...]],
        cache_changes: CacheChanges,
        is_idle: Callable[[], bool],
        on_replaced: Callable[[], None],
    ) -> None:
        self._info = info
        self._registry = registry
        self._index = index
        self._load = load
        self._transports = transports
        self._cache_changes = cache_changes
        self._is_idle = is_idle
        self._on_replaced = on_replaced
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._drain_task: asyncio.Task[None] | None = None

    @property
    def state(self) -> NodeState:
        return self._info.state

    @property
    def model_key(self) -> str:
        """What separates prefix caches of different models and layouts."""
        return self._info.compatibility_hash

    @property
    def info(self) -> NodeInfo:
        """The entry as it is now, load and transports included."""
        return replace(self._info, load=self._load(), transports=self._transports())

    def description(self) -> pb.NodeDescription:
        return encode_description(self.info, version=VERSION)

    def load_message(self) -> pb.NodeLoad:
        return encode_load(self._load())

    def start(self, grpc_address: str, metrics_address: str) -> None:
        """The node serves at these addresses: let the cluster know."""
        self._info = replace(
            self._info,
            state=NodeState.READY,
            grpc_address=grpc_address,
            metrics_address=metrics_address,
        )
        self._task = asyncio.create_task(self._beat(), name="heartbeat")

    def control(self, action: pb.ControlRequest.Action) -> str:
        """Carry out an operator's order; the state after it. Raises `InvalidRequest`."""
        match action:
            case pb.ControlRequest.CORDON if self.state is NodeState.READY:
                self._move_to(NodeState.CORDONED)
            case pb.ControlRequest.UNCORDON:
                self._uncordon()
            case pb.ControlRequest.DRAIN:
                self.drain()
            case pb.ControlRequest.ACTION_UNSPECIFIED:
                raise InvalidRequest("The control request names no action.")
        return self.state.value

    def drain(self) -> None:
        """Take no new work; become DRAINED once what runs has ended."""
        if self.state not in (NodeState.DRAINING, NodeState.DRAINED):
            self._move_to(NodeState.DRAINING)
            self._drain_task = asyncio.create_task(self._until_idle(), name="drain")

    async def drained(self, timeout_seconds: float) -> bool:
        """Wait for DRAINED. False when the time ran out before."""
        self.drain()
        if self._drain_task is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._drain_task), timeout_seconds)
        return self.state is NodeState.DRAINED

    async def stop(self) -> None:
        """Withdraw from the registry: nobody is sent here any more."""
        for task in (self._task, self._drain_task):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        with contextlib.suppress(StoreUnavailable):
            await self._registry.withdraw(self._info.id)

    def _uncordon(self) -> None:
        if self.state not in (NodeState.READY, NodeState.STARTING):
            if self._drain_task is not None:
                self._drain_task.cancel()
                self._drain_task = None
            self._move_to(NodeState.READY)

    def _move_to(self, state: NodeState) -> None:
        logger.info("node state: %s -> %s", self.state, state)
        self._info = replace(self._info, state=state)
        self._changed.set()

    async def _until_idle(self) -> None:
        while not self._is_idle():
            await asyncio.sleep(DRAIN_POLL_SECONDS)
        self._move_to(NodeState.DRAINED)

    async def _beat(self) -> None:
        is_announced = False
        while True:
            self._changed.clear()
            try:
                if not is_announced:
                    await self._registry.announce(self.info)
                    is_announced = True
                elif await self._registry.heartbeat(self.info) is Heartbeat.REPLACED:
                    self._replaced()
                    return
                await self._publish_cache_changes()
            except StoreUnavailable as error:
                logger.warning("the registry does not answer: %s", error.message)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), HEARTBEAT_SECONDS)

    async def _publish_cache_changes(self) -> None:
        stored, removed = await self._cache_changes()
        if stored or removed:
            await self._index.publish(self._info.id, stored, removed)

    def _replaced(self) -> None:
        """Another process has this name now: a node that slept too long must not go on."""
        logger.error("another incarnation of %s has registered; this one ends", self._info.id.name)
        self._on_replaced()
