"""Carries sequences to nodes and their tokens back: the I/O around each `SequenceMachine`.

Life of a sequence here
    1. `submit` places it, tells the prefill node (or the decode node alone), debits both.
    2. Frames from nodes, losses of nodes and passing time are events for its machine; what the
       machine says is carried out: deliver, cancel, ask.
    3. An attempt that nodes or transfers failed may be followed by another on other nodes
       (`retries.py`); its listener notices nothing.
    4. Its ending is delivered once, its debits are taken back, and it is forgotten: whatever
       comes for it later is dropped.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING

from cluster.codec import encode_handoff, encode_sequence
from cluster.errors import Cancelled, NodeUnavailable, ServingError
from cluster.membership import SessionLost, SessionOpened
from cluster.proto import node_pb2 as pb
from cluster.request import Handoff, KVLoadFailurePolicy, SequenceRequest, TokenDelta
from gateway.active import ActiveSequence, Listener, demand_of
from gateway.retries import RetryBudget, RetryKind, Stream
from gateway.router import Placement, choose, choose_again
from gateway.sequence_instructions import (
    AskDecode,
    CancelDecode,
    CancelPrefill,
    Deliver,
    Instructions,
    Patience,
)
from gateway.sequence_machine import SequenceMachine

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
        self._attempts: dict[str, str] = {}  # of each stream, the attempt in flight
        self._budget = RetryBudget()
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
        kv_load_failure_policy: KVLoadFailurePolicy | None = None,
    ) -> None:
        """`kv_load_failure_policy` None: the gateway's. Raises `NodeUnavailable` when no pair can
        take it; nothing has happened then."""
        now = self._clock()
        policy = self._policy.current
        placement = choose(
            self.nodes.candidates(num_cached_tokens),
            demand_of(request),
            local_prefill_tokens=policy.local_prefill_tokens,
        )
        self._measures.routing_decision.observe(self._clock() - now)
        seconds = request.deadline_seconds
        stream = Stream(
            request,
            deadline=None if seconds is None else now + seconds,
            recovers=policy.stream_recovery,
            kv_load_failure_policy=kv_load_failure_policy or policy.kv_load_failure_policy,
        )
        self._budget.deposit()
        self._start(stream, request, placement, num_cached_tokens, listener, now)

    def _start(
        self,
        stream: Stream,
        request: SequenceRequest,
        placement: Placement,
        num_cached_tokens: Mapping[NodeName, int],
        listener: Listener,
        now: float,
    ) -> None:
        """One attempt. Raises `NodeUnavailable`; nothing has happened then."""
        active = self._activate(stream, request, placement, listener, now)
        active.num_queued_tokens -= num_cached_tokens.get(active.prefilling.info.id.name, 0)
        active.prefilling.tally.queued_tokens += active.num_queued_tokens
        if not active.prefilling.client.send(self._submit_frame(active)):
            self._forget(active)
            raise NodeUnavailable("The chosen node went away.", retry_after_seconds=1.0)

    def _submit_frame(self, active: ActiveSequence) -> pb.GatewayFrame:
        handoff = None
        if active.prefill is not None:
            decode = active.placement.decode
            handoff = Handoff(
                transfer_id=os.urandom(16),
                attempt=active.stream.num_attempts,
                decode=decode.id,
                decode_address=decode.grpc_address,
                gateway_id=self._gateway_id,
                kv_load_failure_policy=active.stream.kv_load_failure_policy,
                holder=active.placement.holder,
            )
        return pb.GatewayFrame(
            submit=pb.Submit(
                sequence=encode_sequence(active.request),
                handoff=None if handoff is None else encode_handoff(handoff),
            )
        )

    def cancel(self, sequence_id: str) -> None:
        """The client is gone, or has all it wants: both nodes stop, nothing is delivered."""
        active = self._active.get(self._attempts.get(sequence_id, ""))
        if active is not None:
            self._carry_out(active, active.machine.cancel(), self._clock())

    def fail_all(self, error: ServingError) -> None:
        for active in list(self._active.values()):
            self.fail(active, error)

    def cancel_request(self, request_id: str) -> int:
        """By an operator: its client gets a typed error. The number of sequences that ended."""
        found = [a for a in self._active.values() if a.request.request_id == request_id]
        for active in found:
            self.fail(active, Cancelled("An operator cancelled this request."))
        return len(found)

    def fail(self, active: ActiveSequence, error: ServingError) -> None:
        """For a reason of this gateway's own: no other attempt follows."""
        self._carry_out(active, active.machine.fail(error), self._clock(), is_retried=False)

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

    def _carry_out(
        self,
        active: ActiveSequence,
        instructions: Instructions,
        now: float,
        *,
        is_retried: bool = True,
    ) -> None:
        ending: TokenDelta | None = None
        for instruction in instructions:
            match instruction:
                case Deliver(delta):
                    if delta.error is None:
                        self._deliver(active, delta, now)
                    else:
                        ending = delta
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
        if ending is not None and not (is_retried and self._has_retried(active, ending, now)):
            active.listener.deliver(ending, now)

    def _has_retried(self, active: ActiveSequence, ending: TokenDelta, now: float) -> bool:
        """Start another attempt if the error, the stream and the cluster allow one."""
        stream, error = active.stream, ending.error
        kind = None if error is None else stream.retry_kind(error, self._budget)
        if kind is None or error is None:
            return False
        request = stream.next_attempt(kind, error, active.placement, now)
        try:
            placement = choose_again(
                self.nodes.candidates({}),
                demand_of(request),
                suspects=stream.suspects,
                avoided=stream.avoided,
            )
            self._start(stream, request, placement, {}, active.listener, now)
        except NodeUnavailable as unavailable:
            if kind is RetryKind.REDISPATCH:
                self._budget.give_back()
            logger.info("%s: no other nodes for it: %s", stream.id, unavailable.message)
            return False
        self._measures.retries[kind.value, error.reason or error.code] += 1
        logger.info("%s: %s after %s", stream.id, kind.value, error.reason or error.code)
        return True

    def _deliver(self, active: ActiveSequence, delta: TokenDelta, now: float) -> None:
        if delta.token_ids:
            if active.num_output_tokens == 0:
                self._settle_queue(active)
                active.first_token_at = now
            elif active.num_output_tokens == 1 and active.prefill is not None:
                self._measures.handoff_gap.observe(now - active.first_token_at)
            active.num_output_tokens += len(delta.token_ids)
        active.stream.deliver(delta)
        active.listener.deliver(delta, now)

    def _send_cancel(self, entry: NodeEntry, sequence_id: str) -> None:
        """A node without a session has already ended what it ran for us."""
        entry.client.send(pb.GatewayFrame(cancel=pb.Cancel(sequence_id=sequence_id)))

    # ---- the books -----------------------------------------------------------------------

    def _activate(
        self,
        stream: Stream,
        request: SequenceRequest,
        placement: Placement,
        listener: Listener,
        now: float,
    ) -> ActiveSequence:
        prefill = None if placement.prefill is None else self._entry(placement.prefill)
        demand = demand_of(request)
        active = ActiveSequence(
            stream=stream,
            request=request,
            machine=SequenceMachine(
                request.sequence_id,
                has_prefill=prefill is not None,
                now=now,
                deadline=stream.deadline,
                patience=self._patience,
                may_recompute=stream.kv_load_failure_policy is KVLoadFailurePolicy.RECOMPUTE,
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
        self._attempts[stream.id] = request.sequence_id
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
        self._attempts.pop(active.stream.id, None)
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
