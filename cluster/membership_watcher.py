"""Keeps a `ClusterView` current: polls the registry, feeds the membership machine, tells changes.

1. `run` polls until cancelled. A registry that does not answer removes nobody.
2. `observe` takes what this process sees itself (sessions, replies), at once.
3. `on_change` and `on_gone` are called on the event loop, in the order things happened.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from cluster import clock as clocks
from cluster.membership import ClusterView, Membership, NodeGone, ViewChanged
from cluster.membership_events import Event, Missing, RegistryLost, Seen, Tick
from cluster.redis_client import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cluster.clock import Clock
    from cluster.node import NodeId
    from cluster.registry import Registry

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5


class MembershipWatcher:
    def __init__(
        self,
        registry: Registry,
        *,
        on_change: Callable[[ClusterView], None],
        on_gone: Callable[[NodeId, str], None] | None = None,
        membership: Membership | None = None,
        clock: Clock = clocks.monotonic,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        """`on_gone` gets the node and why: "replaced", "withdrawn" or "expired"."""
        self._registry = registry
        self._on_change = on_change
        self._on_gone = on_gone
        self._membership = Membership() if membership is None else membership
        self._clock = clock
        self._poll_seconds = poll_seconds

    @property
    def view(self) -> ClusterView:
        return self._membership.view

    async def run(self) -> None:
        """Poll until cancelled."""
        while True:
            await self.poll()
            await asyncio.sleep(self._poll_seconds)

    async def poll(self) -> bool:
        """Read the registry once; False when it did not answer."""
        try:
            infos = await self._registry.nodes()
        except StoreUnavailable:
            self._feed([RegistryLost()])
            return False
        present = {info.id.name for info in infos}
        events: list[Event] = [Seen(info) for info in infos]
        events += [Missing(name) for name in self.view.nodes if name not in present]
        self._feed([*events, Tick()])
        return True

    def observe(self, event: Event) -> None:
        self._feed([event])

    def _feed(self, events: Sequence[Event]) -> None:
        for instruction in self._membership.handle_all(events, self._clock()):
            match instruction:
                case NodeGone(node, reason):
                    logger.info("node %s is gone: %s", node.name, reason)
                    if self._on_gone is not None:
                        self._on_gone(node, reason)
                case ViewChanged(view):
                    self._on_change(view)
