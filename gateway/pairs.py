"""What sequences tell of the pairs of nodes that they go through: when a hand-off has failed, and
what is logged and counted of those that are held back (`pair_breaker.py`).

A hand-off has succeeded when the decode node starts the sequence from KV that it was given. It has
failed when the decode node starts it and has to compute what is missing, or when the sequence ends
before its start in an error of the transfer, whichever node says so. Every other ending tells
nothing of the pair: a cancel, a deadline, overload, a broken engine, a lost node. So does a failure
while either node leaves or has no session with this gateway: what is missed then is that node.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from cluster.errors import TransferError
from gateway.pair_breaker import OpenPair, PairBreaker

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

    from cluster.errors import ServingError
    from cluster.node import NodeId
    from gateway.active import ActiveSequence
    from gateway.measures import Measures
    from gateway.pair_breaker import Pair

logger = logging.getLogger(__name__)
RECOMPUTED = "recomputed"


class Pairs:
    """Each sequence with a prefill node `begin`s, then either has `started` or `ended`."""

    def __init__(self, measures: Measures) -> None:
        self._breaker = PairBreaker()
        self._measures = measures

    def held_back(self, now: float) -> AbstractSet[Pair]:
        return self._breaker.held_back(now)

    def open_pairs(self, now: float) -> list[OpenPair]:
        return self._breaker.open_pairs(now)

    def begin(self, active: ActiveSequence, now: float) -> None:
        if active.pair is not None:
            self._breaker.begun(active.pair, active.request.sequence_id, now)

    def started(self, active: ActiveSequence, now: float) -> None:
        """On its decode node."""
        pair = active.pair
        if pair is None:
            return
        if active.machine.is_recomputed:
            self._failed(pair, active, RECOMPUTED, now)
        elif self._breaker.succeeded(pair):
            self._count()
            logger.info("%s: taken again, a hand-off succeeded", active.nodes)

    def ended(self, active: ActiveSequence, error: ServingError | None, now: float) -> None:
        """Before it has started. `error` None: nobody failed."""
        pair = active.pair
        if pair is None:
            return
        if isinstance(error, TransferError):
            self._failed(pair, active, error.reason or error.code, now)
        else:
            self._breaker.released(pair, active.request.sequence_id)

    def keep(self, nodes: AbstractSet[NodeId]) -> None:
        """Forget what is known of all others: they are gone."""
        self._breaker.keep(nodes)
        self._count()

    def _failed(self, pair: Pair, active: ActiveSequence, reason: str, now: float) -> None:
        attempt_id = active.request.sequence_id
        if not active.is_connected or active.leaving:
            self._breaker.released(pair, attempt_id)
            return
        pause = self._breaker.failed(pair, attempt_id, reason, now)
        if pause is None:
            return
        self._count()
        self._measures.pair_holds[reason] += 1
        logger.warning(
            "%s: held back for %g s, as hand-offs between them fail (%s)",
            active.nodes,
            pause,
            reason,
        )

    def _count(self) -> None:
        self._measures.num_pairs_held_back = self._breaker.num_open
