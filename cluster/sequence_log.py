"""What a node's log says of sequences: under the id of the request too, which is what a client has.

1. `taken`: a sequence came here; which request it belongs to is remembered.
2. `facts` puts both ids on any line about it.
3. `ended` or `failed`: one line says what became of it here, so that one search for the id of a
   request through the logs of all nodes finds each node that worked on it.

An id is remembered beyond the end, for what is still said of it, until `capacity` others have come.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.errors import ServingError
    from cluster.request import SequenceRequest

logger = logging.getLogger(__name__)
CAPACITY = 8192  # some 2 MB


class SequenceLog:
    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._request_ids: OrderedDict[str, str] = OrderedDict()  # by the id of the sequence

    def taken(self, request: SequenceRequest) -> None:
        self._request_ids[request.sequence_id] = request.request_id
        self._request_ids.move_to_end(request.sequence_id)
        if len(self._request_ids) > self._capacity:
            self._request_ids.popitem(last=False)

    def facts(self, sequence_id: str) -> dict[str, object]:
        """For `extra`; of one that is not known, its own id alone."""
        facts: dict[str, object] = {"sequence_id": sequence_id}
        request_id = self._request_ids.get(sequence_id)
        return facts if request_id is None else {"request_id": request_id, **facts}

    def ended(self, sequence_id: str, outcome: str, seconds: float, **facts: object) -> None:
        """Without an error. `seconds`: that it was here."""
        known = {**self.facts(sequence_id), "outcome": outcome, "seconds": round(seconds, 4)}
        logger.info("a sequence ended", extra={**known, **facts})

    def failed(self, sequence_id: str, error: ServingError) -> None:
        facts = {**self.facts(sequence_id), "error": error.code, "reason": error.reason}
        logger.info("a sequence ended in an error", extra=facts)
