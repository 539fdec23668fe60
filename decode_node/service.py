"""A decode node's answers to gateways and to its KV receiver.

Life of a sequence here
    1. RESERVED  a prefill node asked for blocks; its KV arrives under a transfer.
    2. RUNNING   the transfer was committed and verified (`started` goes to the gateway), or a
                 gateway submitted the whole prompt to be computed here.
    3. DONE      it finished, failed or was cancelled; its last delta is published, its blocks
                 are free.

A cancel that overtakes the reservation is remembered, so the late `Reserve` is refused.
A hand-off that failed under the policy `recompute` goes on here: once nothing can write into its
blocks any more, what is missing is computed like any prompt, inside a budget (`recompute.py`).
An orphan (its prefill node was lost) is answered: started, or its error. Never silence.
A deadline that passes ends a sequence in any state; a gateway that goes ends all of its own.
All methods run on the event loop; the engine is reached through `EngineLoop.call`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from cluster.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    NodeUnavailable,
    ServingError,
    TransferFailed,
)
from cluster.failpoints import failpoint
from cluster.isolation import isolated
from cluster.node import NodeState
from decode_node.streams import Remembered, Stream, Streams, orphan_error
from engine.loop_errors import refusal, unawaited
from node_parts.requests import inspect_reply, runnable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from collections.abc import Sequence as SequenceOf
    from concurrent.futures import Future

    from cluster.member import Member
    from cluster.proto import node_pb2 as pb
    from cluster.request import Handoff, SequenceRequest, TokenDelta
    from cluster.session_hub import SessionHub
    from decode_node.recompute import RecomputeBudget
    from decode_node.reservations import Reservations, ReservedBlocks
    from decode_node.scheduler import DecodeScheduler
    from engine.engine import Engine
    from engine.loop import EngineLoop
    from engine.sequence import Sequence
    from kv_transfer.receiving.receiver import KVReceiver

logger = logging.getLogger(__name__)
# A draining node still takes the hand-offs of prompts that were placed before the order.
TAKES_HANDOFFS = (NodeState.READY, NodeState.CORDONED, NodeState.DRAINING)
# The event loop sleeps no longer than this while the engine launches the first step of a sequence.
LAUNCH_SECONDS = 0.002


class DecodeHandler:
    """The `Handler` of a decode node and the `BlockSource` of its receiver."""

    def __init__(
        self,
        engine: Engine,
        scheduler: DecodeScheduler,
        reservations: Reservations,
        hub: SessionHub,
        budget: RecomputeBudget,
    ) -> None:
        self._engine = engine
        self._budget = budget
        self._scheduler = scheduler
        self._reservations = reservations
        self._hub = hub
        self._streams = Streams(hub, budget)
        self._cancelled = Remembered()
        self._event_loop = asyncio.get_running_loop()
        self._loop: EngineLoop
        self._receiver: KVReceiver
        self._member: Member

    def bind(self, loop: EngineLoop, receiver: KVReceiver, member: Member) -> None:
        self._loop, self._receiver, self._member = loop, receiver, member

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    # ---- frames of gateways -----------------------------------------------------------

    def submit(self, gateway_id: str, sequence: SequenceRequest, handoff: Handoff | None) -> None:
        if handoff is not None:
            raise InvalidRequest("A decode node does not hand off.")
        if self._member.state is not NodeState.READY:
            raise NodeUnavailable("This decode node takes no new work.", reason="not_ready")
        accepted = self._accept(sequence, gateway_id)
        self._streams.open(Stream(sequence, gateway_id, is_started=True), self._on_deadline)
        adding = asyncio.wrap_future(self._loop.call(lambda: self._scheduler.add(accepted)))
        adding.add_done_callback(lambda done: self._on_added(sequence.sequence_id, done))

    def cancel(self, sequence_id: str) -> None:
        self._cancelled.add(sequence_id)
        stream = self._streams.close(sequence_id)
        if stream is not None:
            self._stop(stream)
            self._streams.log_end(stream, "cancelled")

    def orphaned(self, gateway_id: str, sequence_id: str) -> None:
        stream = self._streams.get(sequence_id)
        if stream is None:
            if sequence_id not in self._streams.finished:
                self._cancelled.add(sequence_id)  # a `Reserve` still under way is refused
                self._streams.say_error(gateway_id, sequence_id, orphan_error())
        elif stream.is_started or stream.is_recomputing:
            self._streams.say_started(stream)
        else:
            # The transfer ends: started, failed, or withdrawn by its sender, or doubted.
            stream.is_orphaned = True
            self._receiver.sender_doubted(sequence_id)

    def gateway_gone(self, gateway_id: str) -> None:
        for sequence_id in self._streams.of(gateway_id):
            cancel, facts = partial(self.cancel, sequence_id), self._hub.log.facts(sequence_id)
            isolated(cancel, "a sequence outlives its gateway", logger, extra=facts)

    def reset_prefix_cache(self) -> None:
        unawaited(self._loop.call(self._engine.block_manager.reset_prefix_cache))

    async def inspect(self) -> pb.InspectReply:
        streams = (
            (s.request, "running" if s.is_started else "waiting_for_kv", s.began_at)
            for _, s in self._streams.items()
        )
        return inspect_reply(streams, self._receiver.leases(), self._member.load_message())

    # ---- the receiver's source of blocks ----------------------------------------------

    async def reserve(self, request: SequenceRequest, gateway_id: str) -> ReservedBlocks:
        """Blocks for a prompt whose KV will arrive; waits for room. Raises `ServingError`."""
        self._hub.log.taken(request)
        if request.sequence_id in self._cancelled:
            raise Cancelled("The request was cancelled.")
        if self._member.state not in TAKES_HANDOFFS:
            raise NodeUnavailable("This decode node takes no hand-offs.", reason="decode_not_ready")
        sequence = self._accept(request, gateway_id)
        stream = self._streams.open(Stream(request, gateway_id), self._on_deadline)
        with ExitStack() as undo:
            undo.callback(self._refuse, stream)
            asking = await asyncio.wrap_future(
                self._loop.call(lambda: self._reservations.ask(sequence))
            )
            blocks = await asyncio.wrap_future(asking)
            undo.pop_all()
        return blocks

    def start(self, sequence_id: str, first_token_id: int) -> Awaitable[None]:
        """The KV is verified and in place: run. The engine hears of it before this returns. It
        raises `ServingError` when it was cancelled, and so does what it gives."""
        stream = self._streams.get(sequence_id)
        if stream is None:
            raise Cancelled("The request was cancelled.")
        if first_token_id >= self._engine.model_config.vocab_size:
            raise TransferFailed("The first token is none of this model's.", reason="unknown")
        failpoint("decode.before_start")
        start = partial(self._start, sequence_id, first_token_id)
        return self._has_started(stream, self._tell(start))

    def _tell(self, start: Callable[[], None]) -> Future[None]:
        if self._engine.overlaps:
            return self._loop.call_and_stand_aside(start, LAUNCH_SECONDS)
        return self._loop.call(start)  # the launch is the step, and leaves the interpreter itself

    async def _has_started(self, stream: Stream, starting: Future[None]) -> None:
        await asyncio.wrap_future(starting)
        if not stream.is_started:
            raise Cancelled("The request was cancelled.")

    def release(self, sequence_id: str) -> None:
        """The transfer ended without a start, and nothing writes into its blocks any more."""
        unawaited(self._loop.call(lambda: self._reservations.cancel(sequence_id)))

    def may_recompute(self, sequence_id: str, num_good_blocks: int) -> bool:
        """Its gateway hears at once that this node goes on with it."""
        stream = self._streams.get(sequence_id)
        if stream is None or stream.is_started:
            return False
        num_good_tokens = num_good_blocks * self._engine.block_manager.block_size
        num_tokens = max(1, len(stream.request.prompt_token_ids) - num_good_tokens)
        told = self._hub.log.facts(sequence_id)
        if not self._budget.admit(sequence_id, num_tokens, time.monotonic()):
            logger.warning("no budget to recompute %d tokens", num_tokens, extra=told)
            return False
        logger.info("recomputes %d tokens", num_tokens, extra=told)
        stream.is_recomputing = True
        self._streams.say_started(stream)
        return True

    def recompute(self, sequence_id: str, num_good_blocks: int) -> None:
        """Nothing writes into its blocks any more: compute what they lack."""
        stream = self._streams.get(sequence_id)
        if stream is None:
            self.release(sequence_id)
            return
        stream.is_started = True
        adding = asyncio.wrap_future(
            self._loop.call(lambda: self._start_partly(sequence_id, num_good_blocks))
        )
        adding.add_done_callback(lambda done: self._on_added(sequence_id, done))

    def on_transfer_failed(self, sequence_id: str, error: ServingError) -> None:
        self._streams.fail(sequence_id, error)

    def on_transfer_withdrawn(self, sequence_id: str) -> None:
        """Nobody failed: it ended on the prefill node, or was cancelled here. A gateway that
        has lost the prefill node knows of no such end."""
        stream = self._streams.close(sequence_id)
        if stream is not None and stream.is_orphaned:
            self._streams.say_error(stream.gateway_id, sequence_id, orphan_error())
        elif stream is not None:
            self._streams.log_end(stream, "withdrawn")

    # ---- reports of the engine --------------------------------------------------------

    def _on_started(self, sequence_id: str) -> None:
        """Comes before the first step's tokens, so `started` reaches the gateway first."""
        stream = self._streams.get(sequence_id)
        if stream is None:
            unawaited(self._loop.call(lambda: self._abort(sequence_id)))
            return
        stream.is_started = True
        self._streams.say_started(stream)

    def on_step(self, deltas: SequenceOf[TokenDelta]) -> None:
        self._streams.deliver(deltas)

    # ---- on the engine's thread -------------------------------------------------------

    def _start(self, sequence_id: str, first_token_id: int) -> None:
        sequence = self._reservations.start(sequence_id, first_token_id)
        self._add(sequence)
        self._event_loop.call_soon_threadsafe(self._on_started, sequence_id)

    def _start_partly(self, sequence_id: str, num_good_blocks: int) -> None:
        sequence = self._reservations.start_partly(sequence_id, num_good_blocks)
        if sequence is None:
            raise TransferFailed("The reservation is gone.", reason="reservation_gone")
        self._add(sequence)

    def _add(self, sequence: Sequence) -> None:
        try:
            self._scheduler.add(sequence)
        except ServingError:
            self._engine.block_manager.free(sequence)
            self._reservations.retry()
            raise

    def _abort(self, sequence_id: str) -> None:
        self._scheduler.abort(sequence_id)
        self._reservations.retry()

    # ---- helpers ----------------------------------------------------------------------

    def _on_deadline(self, stream: Stream) -> None:
        self._streams.fail(
            stream.request.sequence_id, DeadlineExceeded("The request's deadline passed.")
        )
        self._stop(stream)

    def _refuse(self, stream: Stream) -> None:
        """No blocks for it. Its prefill node is told so and tells the gateway, if it still can."""
        sequence_id = stream.request.sequence_id
        if self._streams.is_open(stream):
            self.on_transfer_withdrawn(sequence_id)
        self.release(sequence_id)

    def _stop(self, stream: Stream) -> None:
        """End what runs or arrives for it; its blocks follow."""
        sequence_id = stream.request.sequence_id
        if stream.is_started:
            unawaited(self._loop.call(lambda: self._abort(sequence_id)))
        else:
            self._receiver.cancel(sequence_id)

    def _accept(self, request: SequenceRequest, gateway_id: str) -> Sequence:
        if request.sequence_id in self._streams:
            raise InvalidRequest("This sequence was submitted before.")
        if not self._hub.is_open(gateway_id):
            raise Cancelled("The gateway of this request is not connected to the decode node.")
        return runnable(request, self._engine, self._member.model_key)

    def _on_added(self, sequence_id: str, adding: asyncio.Future[None]) -> None:
        error = refusal(adding)
        if error is not None:
            self._streams.fail(sequence_id, error)
