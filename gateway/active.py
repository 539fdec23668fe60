"""One attempt at one sequence, as the dispatcher keeps it while it is in flight."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from gateway.router import Demand

if TYPE_CHECKING:
    from cluster.errors import ServingError
    from cluster.node import NodeId
    from cluster.request import SequenceRequest, TokenDelta
    from gateway.nodes import NodeEntry
    from gateway.pair_breaker import Pair
    from gateway.retries import Stream
    from gateway.router import Placement
    from gateway.sequence_machine import SequenceMachine, SequenceState

logger = logging.getLogger(__name__)

# What a sequence is expected to generate, for the memory forecast, when it may generate more.
EXPECTED_OUTPUT_TOKENS = 512


class Listener(Protocol):
    """Who gets a sequence's tokens. Called on the event loop; must not block."""

    def placed(self, nodes: str) -> None:
        """An attempt begins on these nodes, as a log names them."""

    def deliver(self, delta: TokenDelta, now: float) -> None:
        """One call has `finish_reason` or `error`: the last. None follows a `cancel`."""


@dataclass(slots=True)
class ActiveSequence:
    """One attempt in flight. `prefill` None: prefilled on the decode node."""

    stream: Stream
    request: SequenceRequest
    machine: SequenceMachine
    placement: Placement
    prefill: NodeEntry | None
    decode: NodeEntry
    listener: Listener
    began_at: float
    num_queued_tokens: int  # debited at the node that prefills until the first token is there
    num_reserved_tokens: int  # debited at the decode node until the end
    num_output_tokens: int = 0
    first_token_at: float = 0.0
    is_on_its_way: bool = True  # it has yet to start on its decode node

    @property
    def prefilling(self) -> NodeEntry:
        return self.decode if self.prefill is None else self.prefill

    @property
    def pair(self) -> Pair | None:
        """None: nothing is handed over."""
        return None if self.prefill is None else (self.prefill.info.id, self.decode.info.id)

    @property
    def nodes(self) -> str:
        """As a log names them: `prefill-0 > decode-0`, or `decode-0` alone."""
        names = [entry.info.id.name for entry in (self.prefill, self.decode) if entry is not None]
        return " > ".join(names)

    @property
    def state(self) -> SequenceState:
        return self.machine.state

    @property
    def is_connected(self) -> bool:
        """With both of its nodes."""
        return self.decode.client.is_connected and self.prefilling.client.is_connected

    @property
    def leaving(self) -> frozenset[NodeId]:
        """Those of its nodes that go in order."""
        nodes = (self.decode, self.prefilling)
        return frozenset(node.info.id for node in nodes if node.client.departure.is_in_order)

    def log_failure(self, error: ServingError, what_follows: str) -> None:
        """Under both ids: the nodes' logs have that of the sequence."""
        facts = {
            "request_id": self.request.request_id,
            "sequence_id": self.request.sequence_id,
            "nodes": self.nodes,
            "error": error.code,
            "reason": error.reason,
            "output_tokens": self.num_output_tokens,
        }
        logger.info("an attempt failed: %s", what_follows, extra=facts)


def demand_of(request: SequenceRequest) -> Demand:
    num_prompt_tokens = len(request.prompt_token_ids)
    most = request.sampling.max_tokens - request.num_emitted_tokens
    return Demand(
        num_prompt_tokens=num_prompt_tokens,
        num_tokens=num_prompt_tokens + min(most, EXPECTED_OUTPUT_TOKENS),
        max_num_tokens=num_prompt_tokens + most,
    )
