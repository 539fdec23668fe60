"""The attempts in flight, and what each weighs on its nodes and in the gateway's counts.

An attempt is debited to its nodes when it begins: a sequence at both, its prompt at the one that
prefills, its memory at the one that decodes. With its first token its prompt queues no more. With
its end everything is taken back, once. Until it has started on the node that decodes, or has ended,
it is on its way there.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cluster.node import NodeName
    from gateway.active import ActiveSequence
    from gateway.measures import Measures
    from gateway.node_client import NodeClient


class Attempts:
    """`active`: by the id of the attempt."""

    def __init__(self, measures: Measures) -> None:
        self.active: dict[str, ActiveSequence] = {}
        self._ids: dict[str, str] = {}  # of each stream, the attempt in flight
        # By the node they go to. Counted: of one that leaves that is asked at every frame.
        self._on_their_way: Counter[NodeClient] = Counter()
        self._measures = measures

    def of_stream(self, stream_id: str) -> ActiveSequence | None:
        return self.active.get(self._ids.get(stream_id, ""))

    def begin(self, active: ActiveSequence, num_cached_tokens: Mapping[NodeName, int]) -> None:
        self.active[active.request.sequence_id] = active
        self._ids[active.stream.id] = active.request.sequence_id
        self._measures.num_waiting += 1
        if active.prefill is not None:
            active.prefill.tally.num_sequences += 1
        self._on_their_way[active.decode.client] += 1
        active.decode.tally.num_sequences += 1
        active.decode.tally.reserved_tokens += active.num_reserved_tokens
        active.num_queued_tokens -= num_cached_tokens.get(active.prefilling.info.id.name, 0)
        active.prefilling.tally.queued_tokens += active.num_queued_tokens

    def got_first_token(self, active: ActiveSequence) -> None:
        """The prompt queues no more."""
        active.prefilling.tally.queued_tokens -= active.num_queued_tokens
        active.num_queued_tokens = 0
        self._measures.num_waiting -= 1
        self._measures.num_running += 1
        if active.prefill is not None:
            active.prefill.tally.num_sequences -= 1

    def is_any_on_its_way(self, client: NodeClient) -> bool:
        """To this node, where it is to be decoded."""
        return client in self._on_their_way

    def has_come(self, active: ActiveSequence) -> None:
        """It has started on its decode node, or never will. Idempotent."""
        if not active.is_on_its_way:
            return
        active.is_on_its_way = False
        client = active.decode.client
        self._on_their_way[client] -= 1
        if not self._on_their_way[client]:
            del self._on_their_way[client]

    def end(self, active: ActiveSequence) -> bool:
        """False if it has ended before."""
        if self.active.pop(active.request.sequence_id, None) is None:
            return False
        self._ids.pop(active.stream.id, None)
        self.has_come(active)
        if not active.num_output_tokens:
            self.got_first_token(active)
        self._measures.num_running -= 1
        active.decode.tally.num_sequences -= 1
        active.decode.tally.reserved_tokens -= active.num_reserved_tokens
        return True
