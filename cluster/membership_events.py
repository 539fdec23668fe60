"""What membership hears: from the registry, of sessions between this process and nodes, of time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.node import NodeId, NodeInfo, NodeName, NodeState


@dataclass(frozen=True, slots=True)
class Seen:
    """The registry holds this entry: an announcement or a heartbeat."""

    info: NodeInfo


@dataclass(frozen=True, slots=True)
class Missing:
    """The registry answered, without an entry for this name."""

    name: NodeName


@dataclass(frozen=True, slots=True)
class StateObserved:
    """The node itself told this process its state, e.g. in reply to cordon or drain."""

    node: NodeId
    state: NodeState


@dataclass(frozen=True, slots=True)
class StateTold:
    """The node says on its session with this process that this is its state, from now on."""

    node: NodeId
    state: NodeState


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """The node said good-bye."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class SessionLost:
    """This process's stream to the node broke, or could not be opened."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class SessionOpened:
    """This process reached the node."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


@dataclass(frozen=True, slots=True)
class RegistryLost:
    """The registry did not answer: no grace runs against nodes that it cannot speak for."""


Event = (
    Seen
    | Missing
    | StateObserved
    | StateTold
    | Withdrawn
    | SessionLost
    | SessionOpened
    | RegistryLost
    | Tick
)
