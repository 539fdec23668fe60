"""Carries sequences to nodes and their tokens back: the I/O around each `SequenceMachine`.

Life of a sequence here
    1. `submit` places it, tells the prefill node (or the decode node alone), debits both.
    2. Frames from nodes, losses of nodes and passing time are events for its machine; what the
       machine says is carried out: deliver, cancel, ask.
    3. Its ending is delivered once, its debits are taken back, and it is forgotten: whatever
       comes for it later is dropped.
"""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from cluster.codec import encode_handoff, encode_sequence
from cluster.errors import Cancelled, NodeUnavailable, ServingError
from cluster.membership import SessionLost, SessionOpened
from cluster.proto import node_pb2 as pb
from cluster.request import Handoff, SequenceRequest, TokenDelta
from gateway.router import Demand, Placement, choose
from gateway.sequence_machine import (
    AskDecode,
    CancelDecode,
    CancelPrefill,
    Deliver,
    Instructions,
    Patience,
    SequenceMachine,
    SequenceState,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cluster.clock import Clock
    from cluster.membership import Event
    from cluster.node import NodeInfo, NodeName
    from gateway.measures import Measures
    from gateway.node_client import NodeClient
    from gateway.nodes import NodeEntry, Nodes
    from gateway.policy import PolicyHolder

logger = logging.getLogger(__name__)

SWEEP_SECONDS = 0.1
# What a sequence is expected to generate, for the memory forecast, when it may generate more.
EXPECTED_OUTPUT_TOKENS = 512


class Listener(Protocol):
    """Who gets a sequence's tokens. Called on the event loop; must not block."""

    def deliver(self, delta: TokenDelta, now: float) -> None:
        """One call has `finish_reason` or `error`: the last. None follows a `cancel`."""


@dataclass(slots=True)
class ActiveSequence:
    """One sequence in flight. `prefill` None: prefilled on the decode node."""

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

    @property
    def prefilling(self) -> NodeEntry:
        return self.decode if self.prefill is None else self.prefill

    @property
    def state(self) -> SequenceState:
        return self.machine.state


class Dispatcher:
    """Also the `SessionListener` of every node's client. `observe` tells membership."""

    def __init__(
        self,
        gateway_id: str,
        *,
        patience: Patience,
        policy: PolicyHolder,
        measures: Measures,
        clock: Clock,
        observe: Callable[[Event], None],
    ) -> None:
        self._gateway_id = gateway_id
        self._patience = patience
        self._policy = policy
        self._measures = measures
        self._clock = clock
        self._observe = observe
        self._active: dict[str, ActiveSequence] = {}
        self.nodes: Nodes  # set once by who wires both: clients need the dispatcher first

    @property
    def active(self) -> Mapping[str, ActiveSequence]:
        return self._active

    # ---- from requests -------------------------------------------------------------------

    def submit(
        self,
        request: SequenceRequest,
        num_cached_tokens: Mapping[NodeName, int],
        listener: Listener,
    ) -> None:
        """Raises `NodeUnavailable` when no pair can take it; nothing has happened then."""
        now = self._clock()
        demand = _demand(request)
        policy = self._policy.current
        placement = choose(
            self.nodes.candidates(num_cached_tokens),
            demand,
            local_prefill_tokens=policy.local_prefill_tokens,
        )
        self._measures.routing_decision.observe(self._clock() - now)
        active = self._activate(request, placement, demand, listener, now)
        active.num_queued_tokens -= num_cached_tokens.get(active.prefilling.info.id.name, 0)
        active.prefilling.tally.queued_tokens += active.num_queued_tokens
        handoff = None
        if placement.prefill is not None:
            handoff = Handoff(
                transfer_id=os.urandom(16),
                attempt=1,
                decode=placement.decode.id,
                decode_address=placement.decode.grpc_address,
                gateway_id=self._gateway_id,
                kv_load_failure_policy=policy.kv_load_failure_policy,
            )
        frame = pb.GatewayFrame(
            submit=pb.Submit(
                sequence=encode_sequence(request),
                handoff=None if handoff is None else encode_handoff(handoff),
            )
        )
        if not active.prefilling.client.send(frame):
            self._forget(active)
            raise NodeUnavailable("The chosen node went away.", retry_after_seconds=1.0)

    def cancel(self, sequence_id: str) -> None:
        """The client is gone, or has all it wants: both nodes stop, nothing is delivered."""
        active = self._active.get(sequence_id)
        if active is not None:
            self._carry_out(active, active.machine.cancel(), self._clock())

    def fail(self, sequence_id: str, error: ServingError) -> None:
        active = self._active.get(sequence_id)
        if active is not None:
            self._carry_out(active, active.machine.fail(error), self._clock())

    def fail_all(self, error: ServingError) -> None:
        for sequence_id in list(self._active):
            self.fail(sequence_id, error)

    def cancel_request(self, request_id: str) -> int:
        """By an operator: its client gets a typed error. The number of sequences that ended."""
        found = [s for s, a in self._active.items() if a.request.request_id == request_id]
        for sequence_id in found:
            self.fail(sequence_id, Cancelled("An operator cancelled this request."))
        return len(found)

    # ---- from nodes ----------------------------------------------------------------------

    def on_connected(self, client: NodeClient) -> None:
        self._observe(SessionOpened(client.node.id))

    def on_deltas(self, client: NodeClient, deltas: list[TokenDelta]) -> None:
        now = self._clock()
        active_sequences = self._active
        for delta in deltas:
            active = active_sequences.get(delta.sequence_id)
            if active is None:
                continue
            if active.decode.client is client:
                instructions = active.machine.decode_delta(delta, now)
            elif active.prefill is not None and active.prefill.client is client:
                instructions = active.machine.prefill_delta(delta, now)
            else:
                continue  # a node may speak for its own sequences only
            if instructions:
                self._carry_out(active, instructions, now)

    def on_lost(self, client: NodeClient) -> None:
        now = self._clock()
        entry: NodeEntry | None = None
        for active in list(self._active.values()):
            if active.decode.client is client:
                entry = active.decode
                self._carry_out(active, active.machine.decode_lost(now), now)
            elif active.prefill is not None and active.prefill.client is client:
                entry = active.prefill
                self._carry_out(active, active.machine.prefill_lost(now), now)
        if entry is not None:
            self.nodes.close_if_idle(entry)
        self._observe(SessionLost(client.node.id))

    def owes_tokens(self, client: NodeClient) -> bool:
        return any(
            active.decode.client is client
            or (active.prefill is not None and active.prefill.client is client)
            for active in self._active.values()
        )

    # ---- time ----------------------------------------------------------------------------

    async def sweep(self) -> None:
        """Give time to every machine, until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            self.tick()

    def tick(self) -> None:
        now = self._clock()
        for active in list(self._active.values()):
            instructions = active.machine.tick(now)
            if instructions:
                self._carry_out(active, instructions, now)

    # ---- carrying out --------------------------------------------------------------------

    def _carry_out(self, active: ActiveSequence, instructions: Instructions, now: float) -> None:
        for instruction in instructions:
            match instruction:
                case Deliver(delta):
                    self._deliver(active, delta, now)
                case CancelPrefill():
                    if active.prefill is not None:
                        self._send_cancel(active.prefill, active.request.sequence_id)
                case CancelDecode():
                    self._send_cancel(active.decode, active.request.sequence_id)
                case AskDecode():
                    orphaned = pb.Orphaned(sequence_id=active.request.sequence_id)
                    active.decode.client.send(pb.GatewayFrame(orphaned=orphaned))
        if active.machine.is_finished:
            self._forget(active)

    def _deliver(self, active: ActiveSequence, delta: TokenDelta, now: float) -> None:
        if delta.token_ids:
            if active.num_output_tokens == 0:
                self._settle_queue(active)
                active.first_token_at = now
            elif active.num_output_tokens == 1 and active.prefill is not None:
                self._measures.handoff_gap.observe(now - active.first_token_at)
            active.num_output_tokens += len(delta.token_ids)
        active.listener.deliver(delta, now)

    def _send_cancel(self, entry: NodeEntry, sequence_id: str) -> None:
        """A node without a session has already ended what it ran for us."""
        entry.client.send(pb.GatewayFrame(cancel=pb.Cancel(sequence_id=sequence_id)))

    # ---- the books -----------------------------------------------------------------------

    def _activate(
        self,
        request: SequenceRequest,
        placement: Placement,
        demand: Demand,
        listener: Listener,
        now: float,
    ) -> ActiveSequence:
        prefill = None if placement.prefill is None else self._entry(placement.prefill)
        deadline = request.deadline_seconds
        active = ActiveSequence(
            request=request,
            machine=SequenceMachine(
                request.sequence_id,
                has_prefill=prefill is not None,
                now=now,
                deadline=None if deadline is None else now + deadline,
                patience=self._patience,
            ),
            placement=placement,
            prefill=prefill,
            decode=self._entry(placement.decode),
            listener=listener,
            began_at=now,
            num_queued_tokens=demand.num_prompt_tokens,
            num_reserved_tokens=demand.num_tokens,
        )
        self._active[request.sequence_id] = active
        self._measures.num_waiting += 1
        if prefill is not None:
            prefill.tally.num_sequences += 1
        active.decode.tally.num_sequences += 1
        active.decode.tally.reserved_tokens += active.num_reserved_tokens
        return active

    def _entry(self, node: NodeInfo) -> NodeEntry:
        entry = self.nodes.get(node.id.name)
        if entry is None or entry.info.id != node.id:
            raise NodeUnavailable("The chosen node went away.", retry_after_seconds=1.0)
        return entry

    def _settle_queue(self, active: ActiveSequence) -> None:
        """The first token is there: the prompt queues no more."""
        active.prefilling.tally.queued_tokens -= active.num_queued_tokens
        active.num_queued_tokens = 0
        self._measures.num_waiting -= 1
        self._measures.num_running += 1
        if active.prefill is not None:
            active.prefill.tally.num_sequences -= 1

    def _forget(self, active: ActiveSequence) -> None:
        if self._active.pop(active.request.sequence_id, None) is None:
            return
        if active.num_output_tokens:
            self._measures.num_running -= 1
        else:
            self._settle_queue(active)
            self._measures.num_running -= 1
        active.decode.tally.num_sequences -= 1
        active.decode.tally.reserved_tokens -= active.num_reserved_tokens
        self.nodes.close_if_idle(active.decode)
        if active.prefill is not None:
            self.nodes.close_if_idle(active.prefill)


def _demand(request: SequenceRequest) -> Demand:
    num_prompt_tokens = len(request.prompt_token_ids)
    expected = min(request.sampling.max_tokens, EXPECTED_OUTPUT_TOKENS)
    return Demand(num_prompt_tokens=num_prompt_tokens, num_tokens=num_prompt_tokens + expected)
