"""How a rank fails: one lost rank ends the whole node."""

from __future__ import annotations

from cluster.errors import InternalError


class RankLost(InternalError):
    """A rank died, stalled or broke off. No step of this engine can run any more."""
