"""Which process of a node's name is the current one.

A process that another has followed under its name does not come back: it was stopped, and wakes.
It must not be taken for the new one, nor end the new one's session. Pure.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.node import NodeId, NodeName

MAX_REMEMBERED = 1024


class Succession:
    """Remembers the last `MAX_REMEMBERED` names, and processes that were followed by another."""

    def __init__(self) -> None:
        self._current: OrderedDict[NodeName, NodeId] = OrderedDict()
        self._replaced: OrderedDict[NodeId, None] = OrderedDict()

    def admit(self, node: NodeId) -> bool:
        """False for a process that was replaced; any other is its name's current one from now."""
        if node in self._replaced:
            return False
        before = self._current.pop(node.name, None)
        self._current[node.name] = node
        if before is not None and before != node:
            self._replaced[before] = None
        while len(self._current) > MAX_REMEMBERED:
            self._current.popitem(last=False)
        while len(self._replaced) > MAX_REMEMBERED:
            self._replaced.popitem(last=False)
        return True
