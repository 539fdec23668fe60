"""Which requests were on which node: asked of the gateway again and again while a row runs.

A request that was placed and lost between two looks is not known; a look takes a few
milliseconds, and the nodes of an error are mostly named by what the gateway did next.
"""

from __future__ import annotations

import math
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.cluster_process import ClusterFace

LOOK_SECONDS = 0.03


@dataclass(frozen=True, slots=True)
class Look:
    at: float  # monotonic seconds
    nodes_of: dict[int, frozenset[str]]  # by the number of the request


@dataclass
class Placements:
    looks: list[Look] = field(default_factory=list)

    def touched(self, name: str, *, since: float = 0.0, until: float = math.inf) -> set[int]:
        """Requests seen on this node in any look between these moments."""
        return {
            number
            for look in self.looks
            if since <= look.at <= until
            for number, nodes in look.nodes_of.items()
            if name in nodes
        }

    def last_before(self, moment: float) -> Look:
        """What was known at that moment."""
        earlier = [look for look in self.looks if look.at <= moment]
        return earlier[-1] if earlier else Look(0.0, {})


@contextmanager
def watched(cluster: ClusterFace) -> Iterator[Placements]:
    """Look during the block."""
    placements = Placements()
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(LOOK_SECONDS):
            at = time.monotonic()
            try:
                requests = cluster.admin("requests")["requests"]
            except (OSError, HTTPException):  # its gateway is the victim
                continue
            placements.looks.append(Look(at, {_number(r["id"]): _nodes(r) for r in requests}))

    thread = threading.Thread(target=run, name="placements")
    thread.start()
    try:
        yield placements
    finally:
        stop.set()
        thread.join()


def _number(request_id: str) -> int:
    """Of an `Ask`, by its id."""
    return int(request_id.rpartition("-")[2])


def _nodes(request: dict[str, object]) -> frozenset[str]:
    names = (request["prefill_node"], request["decode_node"])
    return frozenset(str(name) for name in names if name is not None)
