"""Who is in the cluster, as one process believes it. Pure: events and time in, changes out.

Life of a node, as seen from here
    1. `Seen`: an entry of the registry names it. It enters the view in the state it claims.
    2. While it lives, further `Seen` refresh its state and load. What this process knows better
       (`StateObserved` after an operator's order) stands until the entry catches up. What the node
       says on its session (`StateTold`) stands while the session does: its entry is read later.
    3. `SessionLost`: this process cannot reach it. It is LOST at once, whatever its entry says,
       until `SessionOpened`, or a new incarnation.
    4. `Missing` from a registry that answered: the entry's time to live ran out, or the registry
       came back empty. After a grace, in which a living node restores its entry, it is gone;
       but not while this process is connected with it, which says more than the registry can.
       `Withdrawn` skips the grace.
    5. A new incarnation under the same name replaces the old one at once. The old one is
       remembered, so that its late messages and revived entries change nothing. One whose entry
       is there long after that lives: it was the other's that was revived.

A registry that does not answer (`RegistryLost`) removes nobody: the last view stays, and what
this process observes itself still applies.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from cluster.membership_events import (
    Event,
    Missing,
    RegistryLost,
    Seen,
    SessionLost,
    SessionOpened,
    StateObserved,
    StateTold,
    Tick,
    Withdrawn,
)
from cluster.node import Incarnation, NodeId, NodeInfo, NodeName, NodeRole, NodeState

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

# Longer than a heartbeat and a poll together, so that a living node is never taken for gone
# because the registry was emptied.
MISSING_GRACE_SECONDS = 3.0
# How long an order's known outcome outweighs an entry that has not caught up with it.
OBSERVATION_SECONDS = 5.0
# Longer than an entry lives without its process (`registry.py`).
RETIRED_SECONDS = 10.0
MAX_RETIRED = 1024


@dataclass(frozen=True, slots=True)
class ClusterView:
    """A snapshot. `nodes` is by name, with every node that is not gone, LOST ones too.

    `prefill` and `decode` are those that may take new work.
    """

    nodes: Mapping[NodeName, NodeInfo]
    prefill: tuple[NodeInfo, ...]
    decode: tuple[NodeInfo, ...]

    @staticmethod
    def of(nodes: Iterable[NodeInfo]) -> ClusterView:
        ordered = sorted(nodes, key=lambda info: info.id.name)
        ready = [info for info in ordered if info.state is NodeState.READY]
        return ClusterView(
            nodes=MappingProxyType({info.id.name: info for info in ordered}),
            prefill=tuple(info for info in ready if info.role is NodeRole.PREFILL),
            decode=tuple(info for info in ready if info.role is NodeRole.DECODE),
        )

    def get(self, name: NodeName) -> NodeInfo | None:
        return self.nodes.get(name)

    def find(self, node: NodeId) -> NodeInfo | None:
        """The node if this very incarnation is the current one."""
        info = self.nodes.get(node.name)
        return info if info is not None and info.id == node else None

    @property
    def incarnations(self) -> dict[NodeName, Incarnation]:
        """Of the nodes that may take new work: what the prefix index is asked about."""
        return {info.id.name: info.id.incarnation for info in (*self.prefill, *self.decode)}


EMPTY_VIEW = ClusterView.of(())


@dataclass(frozen=True, slots=True)
class ViewChanged:
    """Use this view from now on."""

    view: ClusterView


@dataclass(frozen=True, slots=True)
class NodeGone:
    """This incarnation will not come back: close its session, fail over what ran there."""

    node: NodeId
    reason: str  # "replaced", "withdrawn" or "expired"


Instruction = ViewChanged | NodeGone


@dataclass(slots=True)
class _Member:
    info: NodeInfo  # as its entry says
    is_lost: bool = False
    is_reached: bool = False  # this process has a session with it
    missing_since: float | None = None
    told: NodeState | None = None  # on that session
    observed: NodeState | None = None
    observed_until: float = 0.0

    def shown(self) -> NodeInfo:
        if self.is_lost:
            return replace(self.info, state=NodeState.LOST)
        if self.told is not None:
            return replace(self.info, state=self.told)
        if self.observed is not None:
            return replace(self.info, state=self.observed)
        return self.info


class Membership:
    """`handle` takes one event and the monotonic time, and returns what follows from it."""

    def __init__(self, *, missing_grace_seconds: float = MISSING_GRACE_SECONDS) -> None:
        self._grace = missing_grace_seconds
        self._members: dict[NodeName, _Member] = {}
        self._retired: OrderedDict[NodeId, float] = OrderedDict()  # each with when it was
        self._view = EMPTY_VIEW

    @property
    def view(self) -> ClusterView:
        return self._view

    def handle(self, event: Event, now: float) -> list[Instruction]:
        return self.handle_all((event,), now)

    def handle_all(self, events: Iterable[Event], now: float) -> list[Instruction]:
        """Several events of one moment: at most one `ViewChanged`, after all `NodeGone`."""
        gone: list[Instruction] = []
        for event in events:
            gone += self._apply(event, now)
        view = ClusterView.of(member.shown() for member in self._members.values())
        if view == self._view:
            return gone
        self._view = view
        return [*gone, ViewChanged(view)]

    def check_integrity(self) -> None:
        """No node is both present and retired, and each stands under its own name."""
        for name, member in self._members.items():
            if member.info.id.name != name or member.info.id in self._retired:
                raise RuntimeError(f"Membership is inconsistent about {name}.")

    def _apply(self, event: Event, now: float) -> list[Instruction]:
        match event:
            case Seen(info):
                return self._seen(info, now)
            case Missing(name):
                self._missing(name, now)
            case StateObserved(node, state):
                self._observed(node, state, now)
            case StateTold(node, state):
                self._told(node, state)
            case Withdrawn(node):
                return self._remove(node, "withdrawn", now)
            case SessionLost(node):
                self._reached(node, is_lost=True)
            case SessionOpened(node):
                self._reached(node, is_lost=False)
            case RegistryLost():
                for member in self._members.values():
                    member.missing_since = None
            case Tick():
                return self._tick(now)
        return []

    def _seen(self, info: NodeInfo, now: float) -> list[Instruction]:
        retired_at = self._retired.get(info.id)
        if retired_at is not None and now - retired_at < RETIRED_SECONDS:
            return []
        self._retired.pop(info.id, None)
        member = self._members.get(info.id.name)
        if member is not None and member.info.id != info.id:
            gone = self._remove(member.info.id, "replaced", now)
            self._members[info.id.name] = _Member(info)
            return gone
        if member is None:
            self._members[info.id.name] = _Member(info)
            return []
        member.info = info
        member.missing_since = None
        if info.state is member.observed:
            member.observed = None
        return []

    def _missing(self, name: NodeName, now: float) -> None:
        member = self._members.get(name)
        if member is not None and member.missing_since is None:
            member.missing_since = now

    def _observed(self, node: NodeId, state: NodeState, now: float) -> None:
        member = self._current(node)
        if member is not None:
            member.observed = state
            member.observed_until = now + OBSERVATION_SECONDS

    def _told(self, node: NodeId, state: NodeState) -> None:
        member = self._current(node)
        if member is not None:
            member.told = state

    def _reached(self, node: NodeId, *, is_lost: bool) -> None:
        member = self._current(node)
        if member is not None:
            member.told = None
            member.is_lost = is_lost
            member.is_reached = not is_lost

    def _tick(self, now: float) -> list[Instruction]:
        gone: list[Instruction] = []
        for member in list(self._members.values()):
            if member.observed is not None and now >= member.observed_until:
                member.observed = None
            missing_since = member.missing_since
            is_overdue = missing_since is not None and now - missing_since >= self._grace
            if is_overdue and not member.is_reached:
                # Not retired: the same process may have been cut off from the registry only.
                del self._members[member.info.id.name]
                gone.append(NodeGone(member.info.id, "expired"))
        return gone

    def _remove(self, node: NodeId, reason: str, now: float) -> list[Instruction]:
        self._retire(node, now)
        if self._current(node) is None:
            return []
        del self._members[node.name]
        return [NodeGone(node, reason)]

    def _retire(self, node: NodeId, now: float) -> None:
        self._retired[node] = now
        self._retired.move_to_end(node)
        while len(self._retired) > MAX_RETIRED:
            self._retired.popitem(last=False)

    def _current(self, node: NodeId) -> _Member | None:
        member = self._members.get(node.name)
        return member if member is not None and member.info.id == node else None
