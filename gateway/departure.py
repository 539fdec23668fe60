"""Whether what is lost of a node is lost in order: it had said that it goes, or it has gone as one
does that has nothing left to do. Pure: what its sessions with this gateway tell, in turn.

Life of a node here (one incarnation)
    STAYS    it takes work, or an operator holds new work back (a cordon): what is lost is trouble
    LEAVING  it has said that it drains. It refuses what reaches it, serves what it has, and may go
             at any moment: whoever misses something of it, itself or a peer, tells of no trouble
    LEFT     it has ended its session in order. An older node says nothing before

What may happen, in any order
    told     the last word of a session holds: a drain makes it LEAVING, however often it is said;
             an uncordon undoes that, and it STAYS
    opened   a session after another. LEAVING holds until the new one says the state, which is the
             first that it says. One that had LEFT is back
    ended    in order: it has LEFT. Broken: one that STAYS is lost, as ever; one that was LEAVING
             had said so, whether it was cut off or killed, and goes on LEAVING

A new process has a new incarnation, a client of its own, and STAYS: what an earlier one said, or
still says, is not about it. Each gateway has its own view, by its own session.
"""

from __future__ import annotations

from enum import Enum, auto

from cluster.node import NodeState

_GOES = (NodeState.DRAINING, NodeState.DRAINED)


class Presence(Enum):
    STAYS = auto()
    LEAVING = auto()
    LEFT = auto()


class Departure:
    """See the module."""

    __slots__ = ("presence",)

    def __init__(self) -> None:
        self.presence = Presence.STAYS

    @property
    def is_in_order(self) -> bool:
        """What is lost of it now is no trouble, and costs no retry."""
        return self.presence is not Presence.STAYS

    def told(self, state: NodeState) -> None:
        self.presence = Presence.LEAVING if state in _GOES else Presence.STAYS

    def opened(self) -> None:
        if self.presence is Presence.LEFT:
            self.presence = Presence.STAYS

    def ended(self, *, in_order: bool) -> None:
        if in_order:
            self.presence = Presence.LEFT
