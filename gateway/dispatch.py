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
import contextlib
from typing import TYPE_CHECKING

from cluster.errors import (
    Cancelled,
    DeadlineExceeded,
    NodeUnavailable,
    RequestTooLarge,
    ServingError,
    TransferError,
)
from cluster.membership_events import SessionLost, SessionOpened, StateTold
from cluster.request import KVLoadFailurePolicy, SequenceRequest, TokenDelta
from gateway.active import ActiveSequence, Listener, demand_of
from gateway.attempts import Attempts
from gateway.node_frames import cancel_frame, orphaned_frame, submit_frame
from gateway.pairs import Pairs
from gateway.retries import RetryBudget, RetryKind, Stream, is_in_order, who_failed
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
    from cluster.membership_events import Event
    from cluster.node import NodeInfo, NodeName, NodeState
    from gateway.measures import Measures
    from gateway.node_client import NodeClient
    from gateway.nodes import NodeEntry, Nodes
    from gateway.policy import Policy

SWEEP_SECONDS = 0.1


class Dispatcher:
    """Also the `SessionListener` of every node's client. `observe` tells membership."""

    def __init__(
        self,
        gateway_id: str,
        *,
        patience: Patience,
        measures: Measures,
        clock: Clock,
        observe: Callable[[Event], None],
    ) -> None:
        self.gateway_id = gateway_id
        self._patience = patience
        self._measures = measures
        self._clock = clock
        self._observe = observe
        self._attempts = Attempts(measures)
        self._budget = RetryBudget()
        self.pairs = Pairs(measures)
        self.nodes: Nodes  # set once by who wires both: clients need the dispatcher first

    @property
    def active(self) -> Mapping[str, ActiveSequence]:
        return self._attempts.active

    @property
    def num_retries_left(self) -> float:
        return self._budget.balance

    # ---- from requests -------------------------------------------------------------------

    def submit(
        self,
        request: SequenceRequest,
        num_cached_tokens: Mapping[NodeName, int],
        listener: Listener,
        policy: Policy,
    ) -> None:
        """Raises `DeadlineExceeded` when nobody waits any more, `NodeUnavailable` when no pair can
        take it, `RequestTooLarge` when it is too much for its node; nothing has happened then."""
        now, seconds = self._clock(), request.deadline_seconds
        if seconds is not None and seconds <= 0.0:
            raise DeadlineExceeded("The request's deadline passed.")
        placement = choose(
            self.nodes.candidates(num_cached_tokens),
            demand_of(request),
            local_prefill_tokens=policy.local_prefill_tokens,
            held_back=self.pairs.held_back(now),
        )
        self._measures.routing_decision.observe(self._clock() - now)
        stream = Stream(
            request,
            deadline=None if seconds is None else now + seconds,
            recovers=policy.stream_recovery,
            kv_load_failure_policy=policy.kv_load_failure_policy,
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
        """One attempt. Raises `NodeUnavailable`, or `RequestTooLarge` when the node does not take
        such a frame; nothing has happened then."""
        active = self._new_attempt(stream, request, placement, listener, now)
        self._attempts.begin(active, num_cached_tokens)
        self.pairs.begin(active, now)
        with contextlib.ExitStack() as undo:
            undo.callback(self._forget, active)
            if not active.prefilling.client.send(submit_frame(active, self.gateway_id)):
                raise NodeUnavailable("The chosen node went away.", retry_after_seconds=1.0)
            undo.pop_all()
        listener.placed(active.nodes)

    def cancel(self, sequence_id: str) -> None:
        """The client is gone, or has all it wants: both nodes stop, nothing is delivered."""
        active = self._attempts.of_stream(sequence_id)
        if active is not None:
            self._carry_out(active, active.machine.cancel(), self._clock())

    def fail_all(self, error: ServingError) -> None:
        for active in list(self._attempts.active.values()):
            self.fail(active, error)

    def cancel_request(self, request_id: str) -> int:
        """By an operator: its client gets a typed error. The number of sequences that ended."""
        found = [a for a in self._attempts.active.values() if a.request.request_id == request_id]
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
        active_sequences = self._attempts.active
        for delta in deltas:
            active = active_sequences.get(delta.sequence_id)
            if active is None:
                continue
            if active.decode.client is client:
                instructions = active.machine.decode_delta(delta, now)
                if active.is_on_its_way and active.machine.is_started:
                    self.pairs.started(active, now)
                    self._attempts.has_come(active)
            elif active.prefill is not None and active.prefill.client is client:
                instructions = active.machine.prefill_delta(delta, now)
            else:
                continue  # a node may speak for its own sequences only
            if instructions:
                self._carry_out(active, instructions, now)
        client.settle()

    def on_state(self, client: NodeClient, state: NodeState) -> None:
        self._observe(StateTold(client.node.id, state))

    def on_lost(self, client: NodeClient) -> None:
        now = self._clock()
        entry: NodeEntry | None = None
        for active in list(self._attempts.active.values()):
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
        active = self._attempts.active.values()
        return any(client in (each.decode.client, each.prefilling.client) for each in active)

    def is_on_its_way(self, client: NodeClient) -> bool:
        return self._attempts.is_any_on_its_way(client)

    # ---- time ----------------------------------------------------------------------------

    async def sweep(self) -> None:
        """Give time to every machine, until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            self.tick()

    def tick(self) -> None:
        now = self._clock()
        for active in list(self._attempts.active.values()):
            instructions = active.machine.tick(now)
            if instructions:
                self._carry_out(active, instructions, now)
        self.pairs.keep({entry.info.id for entry in self.nodes})

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
                        active.prefill.client.send(cancel_frame(active.request.sequence_id))
                case CancelDecode():
                    active.decode.client.send(cancel_frame(active.request.sequence_id))
                case AskDecode():
                    active.decode.client.send(orphaned_frame(active.request.sequence_id))
        if active.machine.is_finished:
            self._forget(active, None if ending is None else ending.error)
        if ending is not None and not (is_retried and self._has_retried(active, ending, now)):
            active.listener.deliver(ending, now)

    def _has_retried(self, active: ActiveSequence, ending: TokenDelta, now: float) -> bool:
        """Start another attempt if the error, the stream and the cluster allow one."""
        stream, error = active.stream, ending.error
        if error is None:
            return False
        failed = who_failed(error, active.placement, active.leaving)
        in_order = is_in_order(error, failed, active.leaving)
        kind = stream.retry_kind(error, self._budget, is_in_order=in_order)
        if kind is None:
            active.log_failure(error, "the client is told")
            return False
        is_handoff = isinstance(error, TransferError)
        request = stream.next_attempt(kind, failed, active.placement, now, is_handoff=is_handoff)
        try:
            placement = choose_again(
                self.nodes.candidates({}),
                demand_of(request),
                suspects=stream.suspects,
                parted=stream.parted,
                avoided=stream.avoided,
                held_back=self.pairs.held_back(now),
            )
            self._start(stream, request, placement, {}, active.listener, now)
        except (NodeUnavailable, RequestTooLarge) as unavailable:
            if kind is RetryKind.REDISPATCH:
                self._budget.give_back()
            active.log_failure(error, f"no other nodes for it: {unavailable.message}")
            return False
        self._measures.retries[kind.value, error.reason or error.code] += 1
        active.log_failure(error, kind.value)
        return True

    def _deliver(self, active: ActiveSequence, delta: TokenDelta, now: float) -> None:
        if delta.token_ids:
            if active.num_output_tokens == 0:
                self._attempts.got_first_token(active)
                active.first_token_at = now
            elif active.num_output_tokens == 1 and active.prefill is not None:
                self._measures.handoff_gap.observe(now - active.first_token_at)
            active.num_output_tokens += len(delta.token_ids)
        active.stream.deliver(delta)
        active.listener.deliver(delta, now)

    def _new_attempt(
        self,
        stream: Stream,
        request: SequenceRequest,
        placement: Placement,
        listener: Listener,
        now: float,
    ) -> ActiveSequence:
        prefill = None if placement.prefill is None else self._entry(placement.prefill)
        demand = demand_of(request)
        return ActiveSequence(
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

    def _entry(self, node: NodeInfo) -> NodeEntry:
        entry = self.nodes.get(node.id.name)
        if entry is None or entry.info.id != node.id:
            raise NodeUnavailable("The chosen node went away.", retry_after_seconds=1.0)
        return entry

    def _forget(self, active: ActiveSequence, error: ServingError | None = None) -> None:
        if active.is_on_its_way:
            self.pairs.ended(active, error, self._clock())
        if self._attempts.end(active):
            active.decode.client.settle()
            self.nodes.close_if_idle(active.decode)
            if active.prefill is not None:
                self.nodes.close_if_idle(active.prefill)
