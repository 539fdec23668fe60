"""A node's membership of the cluster, from first heartbeat to withdrawal.

Life of a member
    STARTING  built; nobody knows it yet
    READY     announced; takes work
    CORDONED  an operator's order: takes no new work, goes on with what it has
    DRAINING  the same, and on its way out: once idle it is
    DRAINED   nothing runs here any more, and the gateways know; the process may end
Gateways hear of a change on their sessions at once (`Gateways`), the rest by the next heartbeat.
Each heartbeat carries the state and the load. Beside it, as often, the prefix index is told what
was cached and dropped: apart, because that asks the engine, which may be in a long step, and a
heartbeat must not wait. Redis down is no reason to stop: the next heartbeat tries again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from cluster.codec import encode_description, encode_load
from cluster.errors import InvalidRequest, NodeUnavailable
from cluster.node import NodeInfo, NodeLoad, NodeState
from cluster.prefix_index import ENTRY_TTL_SECONDS
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
HUNG_SECONDS = 30.0  # no step takes so long once the kernels are compiled

# Half of an index entry's life: what is still cached is published again before it expires.
REPUBLISH_SECONDS = ENTRY_TTL_SECONDS / 2

# Hashes stored (parents first) and removed (leaves first) since the last call; given True, all
# that are cached now.
CacheChanges = Callable[[bool], Awaitable[tuple[Sequence["BlockHash"], Sequence["BlockHash"]]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberSources:
    """Where a member gets what it tells the cluster. Called on the event loop."""

    load: Callable[[], NodeLoad]
    transports: Callable[[], tuple[str, ...]]
    cache_changes: CacheChanges
    is_idle: Callable[[], bool]
    on_replaced: Callable[[], None]
    seconds_without_progress: Callable[[], float] = lambda: 0.0  # of the engine, while it has work


class Gateways(Protocol):
    """Those with a session here: a `SessionHub`."""

    def tell(self, state: NodeState) -> None: ...
    @property
    def num_connected(self) -> int: ...
    @property
    def is_answered(self) -> bool:
        """None is waited for: they know the state that was last told, and nothing that they had
        placed here is still on its way."""


class Member:
    """Announces one node and keeps the announcement true. Lives on the event loop."""

    def __init__(
        self,
        info: NodeInfo,
        registry: Registry,
        index: PrefixIndex,
        sources: MemberSources,
        gateways: Gateways,
    ) -> None:
        self._info = info
        self._registry = registry
        self._index = index
        self._sources = sources
        self._gateways = gateways
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._drain_task: asyncio.Task[None] | None = None
        self._is_leaving = False
        self._needs_all = False
        self._published_all_at = time.monotonic()

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
        return replace(self._info, load=self._load(), transports=self._sources.transports())

    def description(self) -> pb.NodeDescription:
        """What a gateway asks to know that the node lives. Raises `NodeUnavailable` when this event
        loop answers but the engine hangs: that is no life."""
        seconds = self._sources.seconds_without_progress()
        if seconds > HUNG_SECONDS:
            raise NodeUnavailable(f"The engine has hung for {seconds:.0f} s.", reason="hung")
        return encode_description(self.info, version=VERSION)

    def load_message(self) -> pb.NodeLoad:
        return encode_load(self._load())

    def _load(self) -> NodeLoad:
        return replace(self._sources.load(), num_gateways=self._gateways.num_connected)

    def start(self, grpc_address: str, metrics_address: str) -> None:
        """The node serves at these addresses: let the cluster know."""
        self._info = replace(
            self._info,
            state=NodeState.READY,
            grpc_address=grpc_address,
            metrics_address=metrics_address,
        )
        self._gateways.tell(self.state)
        self._tasks = [
            asyncio.create_task(self._beat(), name="heartbeat"),
            asyncio.create_task(self._publish(), name="publish cache"),
        ]

    def control(self, action: pb.ControlRequest.Action) -> str:
        """Carry out an operator's order; the state after it. Raises `InvalidRequest`, and
        `NodeUnavailable` for one that comes too late."""
        match action:
            case pb.ControlRequest.CORDON:
                self.cordon()
            case pb.ControlRequest.UNCORDON:
                self._uncordon()
            case pb.ControlRequest.DRAIN:
                self.drain()
            case pb.ControlRequest.ACTION_UNSPECIFIED:
                raise InvalidRequest("The control request names no action.")
        return self.state.value

    def cordon(self) -> None:
        """Take no new work."""
        if self.state is NodeState.READY:
            self._move_to(NodeState.CORDONED)

    def drain(self) -> None:
        """Take no new work; become DRAINED once what runs has ended."""
        if self.state not in (NodeState.DRAINING, NodeState.DRAINED):
            self._move_to(NodeState.DRAINING)
            self._drain_task = asyncio.create_task(self._until_idle(), name="drain")

    async def drained(self, timeout_seconds: float) -> bool:
        """Wait for DRAINED. False when the time ran out before. The process is to end: an order to
        take work again is refused from now on, as it would cut what still runs."""
        self._is_leaving = True
        self.drain()
        if self._drain_task is not None:
            await asyncio.wait({self._drain_task}, timeout=timeout_seconds)
        return self.state is NodeState.DRAINED

    async def stop(self) -> None:
        """Withdraw from the registry: nobody is sent here any more."""
        tasks = [*self._tasks, *([self._drain_task] if self._drain_task else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(StoreUnavailable):
            await self._registry.withdraw(self._info.id)

    def _uncordon(self) -> None:
        if self._is_leaving:
            raise NodeUnavailable("The node was told to end.", reason="leaving")
        if self.state not in (NodeState.READY, NodeState.STARTING):
            if self._drain_task is not None:
                self._drain_task.cancel()
                self._drain_task = None
            self._move_to(NodeState.READY)

    def _move_to(self, state: NodeState) -> None:
        logger.info("node state: %s -> %s", self.state, state)
        self._info = replace(self._info, state=state)
        self._gateways.tell(state)
        self._changed.set()

    async def _until_idle(self) -> None:
        """What gateways had placed here comes first, maybe by way of other nodes; and they have
        read all that was said here before it goes."""
        await _until(lambda: self._gateways.is_answered and self._sources.is_idle())
        self._move_to(NodeState.DRAINED)
        await _until(lambda: self._gateways.is_answered)

    async def _beat(self) -> None:
        is_announced = False
        while True:
            self._changed.clear()
            try:
                if not is_announced:
                    await self._registry.announce(self.info)
                    is_announced = True
                elif not await self._renew():
                    return
            except StoreUnavailable as error:
                logger.debug("the registry does not answer: %s", error.message)
            except Exception:  # the next one may not: a node without heartbeats is forgotten
                logger.exception("a heartbeat failed")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_SECONDS):
                    await self._changed.wait()

    async def _renew(self) -> bool:
        """One heartbeat; False when this process has been replaced."""
        match await self._registry.heartbeat(self.info):
            case Heartbeat.REPLACED:
                self._replaced()
                return False
            case Heartbeat.RESTORED:
                self._needs_all = True
            case Heartbeat.RENEWED:
                pass
        return True

    async def _publish(self) -> None:
        while True:
            try:
                await self._publish_cache_changes()
            except Exception:  # costs hits, and is told anew
                logger.exception("the prefix index could not be told of the cache")
            await asyncio.sleep(HEARTBEAT_SECONDS)

    async def _publish_cache_changes(self) -> None:
        """Tell the index what changed; all of it after a loss, and before entries expire."""
        is_due = time.monotonic() - self._published_all_at >= REPUBLISH_SECONDS
        everything = self._needs_all or is_due
        self._needs_all = False
        is_published = False
        try:
            stored, removed = await self._sources.cache_changes(everything)
            is_published = not (stored or removed or everything) or await self._index.publish(
                self._info.id, stored, removed
            )
        finally:
            self._needs_all = self._needs_all or not is_published
        if everything:
            self._published_all_at = time.monotonic()

    def _replaced(self) -> None:
        """Another process has this name now: a node that slept too long must not go on."""
        logger.error("another incarnation of %s has registered; this one ends", self._info.id.name)
        self._sources.on_replaced()


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what it asks has no event
        await asyncio.sleep(DRAIN_POLL_SECONDS)
