"""A prefill node's answers to gateways: one prompt in, its KV handed off, its first token out.

Life of a prompt here
    1. QUEUED     submitted; the engine thread has it. Nothing is reserved anywhere yet. Before,
                  what another node has cached of it may be fetched (`prefix_fetches.py`).
    2. SENDING    first scheduled: blocks are reserved on its decode node, and each computed
                  chunk is sent while the next one computes.
    3. COMMITTING its first token went to the gateway; the decode node is told to start.
    4. DONE       the decode node has it (`handed_off`), or it ended with its first token, or
                  it ended in one typed error. Its source blocks are freed when the last send
                  that reads them has ended, which may be later.

Cancel, deadline, the loss of the gateway and every error lead to DONE from any state.
All methods run on the event loop; the engine is reached through `EngineLoop.call`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from cluster.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    NodeUnavailable,
    ServingError,
)
from cluster.failpoints import failpoint
from cluster.isolation import isolated
from cluster.node import NodeState
from cluster.request import TokenDelta
from engine.loop_errors import refusal, unawaited
from node_parts.requests import inspect_reply, runnable

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as SequenceOf

    from cluster.member import Member
    from cluster.proto import node_pb2 as pb
    from cluster.request import Handoff, PrefixHolder, SequenceRequest
    from cluster.session_hub import SessionHub
    from engine.engine import Engine
    from engine.loop import EngineLoop
    from engine.sequence import Sequence
    from kv_transfer.sending.sender import KVSender
    from prefill_node.loop import ComputedChunk, ComputedLayers, PrefillObserver, StepReport
    from prefill_node.prefix_fetches import PrefixFetches
    from prefill_node.scheduler import PrefillScheduler

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Prompt:
    """What the service knows of one prompt. `is_done`: its last delta has been published."""

    request: SequenceRequest
    gateway_id: str
    handoff: Handoff
    is_sending: bool = False
    is_done: bool = False
    submitted_at: float = field(default_factory=time.monotonic)
    alarm: asyncio.TimerHandle | None = None
    fetching: asyncio.Task[None] | None = None

    def end(self) -> None:
        self.is_done = True
        if self.alarm is not None:
            self.alarm.cancel()

    def request_now(self) -> SequenceRequest:
        """The request with what is left of its deadline, which queueing here has shortened."""
        seconds = self.request.deadline_seconds
        if seconds is None:
            return self.request
        left = max(0.0, seconds - (time.monotonic() - self.submitted_at))
        return replace(self.request, deadline_seconds=left)


class PrefillHandler:
    """The `Handler` of a prefill node. `bind` gives it the parts that call it back."""

    def __init__(self, engine: Engine, scheduler: PrefillScheduler, hub: SessionHub) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._hub = hub
        self._prompts: dict[str, Prompt] = {}
        self._loop: EngineLoop
        self._observer: PrefillObserver
        self._sender: KVSender
        self._member: Member
        self._fetches: PrefixFetches | None = None

    def bind(
        self,
        loop: EngineLoop,
        observer: PrefillObserver,
        sender: KVSender,
        member: Member,
        fetches: PrefixFetches | None = None,
    ) -> None:
        """`fetches` None: every prompt is computed as far as it is not cached here."""
        self._loop, self._observer, self._sender = loop, observer, sender
        self._member = member
        self._fetches = fetches

    @property
    def num_prompts(self) -> int:
        """Those that have not ended. Sends may still read the blocks of others."""
        return sum(not prompt.is_done for prompt in self._prompts.values())

    # ---- frames of gateways -----------------------------------------------------------

    def submit(self, gateway_id: str, sequence: SequenceRequest, handoff: Handoff | None) -> None:
        if handoff is None:
            raise InvalidRequest("A prefill node needs to know where to hand off.")
        if self._member.state is not NodeState.READY:
            raise NodeUnavailable("This prefill node takes no new work.", reason="not_ready")
        if sequence.sequence_id in self._prompts:
            raise InvalidRequest("This sequence was submitted before.")
        accepted = runnable(sequence, self._engine, self._member.model_key)
        prompt = Prompt(sequence, gateway_id, handoff)
        self._prompts[sequence.sequence_id] = prompt
        if sequence.sampling.max_tokens > 1:
            # While it queues: the first hand-off of a pair does not wait for the connection.
            self._sender.pair(handoff.decode, handoff.decode_address)
        if sequence.deadline_seconds is not None:
            prompt.alarm = asyncio.get_running_loop().call_later(
                sequence.deadline_seconds, self._on_deadline, sequence.sequence_id, prompt
            )
        if self._fetches is None or handoff.holder is None:
            self._queue(accepted)
        else:
            fetching = self._fetch(self._fetches, prompt, accepted, handoff.holder)
            prompt.fetching = asyncio.create_task(fetching)

    async def _fetch(
        self, fetches: PrefixFetches, prompt: Prompt, accepted: Sequence, holder: PrefixHolder
    ) -> None:
        try:
            await fetches.fetch(accepted, holder)
        finally:  # whatever it broke over: its client waits for the prompt, not for the fetch
            if not prompt.is_done:
                self._queue(accepted)

    def _queue(self, accepted: Sequence) -> None:
        adding = asyncio.wrap_future(self._loop.call(lambda: self._scheduler.add(accepted)))
        adding.add_done_callback(lambda done: self._on_added(accepted.sequence_id, done))

    def _on_added(self, sequence_id: str, adding: asyncio.Future[None]) -> None:
        error = refusal(adding)
        if error is not None:
            self._fail(sequence_id, error)

    def _on_deadline(self, sequence_id: str, prompt: Prompt) -> None:
        if self._prompts.get(sequence_id) is prompt:
            self._fail(sequence_id, DeadlineExceeded("The request's deadline passed."))

    def cancel(self, sequence_id: str) -> None:
        prompt = self._prompts.get(sequence_id)
        if prompt is not None and not prompt.is_done:
            prompt.end()
            self._stop(sequence_id, prompt)
            self._log_end(prompt, "cancelled")

    def orphaned(self, gateway_id: str, sequence_id: str) -> None:
        told = self._hub.log.facts(sequence_id)
        logger.warning("gateway %s asked a prefill node about an orphan", gateway_id, extra=told)

    def gateway_gone(self, gateway_id: str) -> None:
        for sequence_id, prompt in list(self._prompts.items()):
            if prompt.gateway_id == gateway_id:
                self._for_one(sequence_id, partial(self.cancel, sequence_id))

    def reset_prefix_cache(self) -> None:
        unawaited(self._loop.call(self._engine.block_manager.reset_prefix_cache))

    async def inspect(self) -> pb.InspectReply:
        prompts = (
            (p.request, "sending" if p.is_sending else "queued", p.submitted_at)
            for p in self._prompts.values()
        )
        return inspect_reply(prompts, self._sender.leases(), self._member.load_message())

    # ---- reports of the engine --------------------------------------------------------

    def on_scheduled(self, sequence_ids: SequenceOf[str]) -> None:
        for sequence_id in sequence_ids:
            self._for_one(sequence_id, partial(self._on_scheduled, sequence_id))

    def _on_scheduled(self, sequence_id: str) -> None:
        prompt = self._prompts.get(sequence_id)
        if prompt is None or prompt.is_done:
            self._release(sequence_id)
        elif prompt.request.sampling.max_tokens > 1:
            self._open(sequence_id, prompt)

    def _open(self, sequence_id: str, prompt: Prompt) -> None:
        try:
            self._sender.open(prompt.request_now(), prompt.handoff)
        except ServingError as error:
            self._fail(sequence_id, error)
        except ValueError:
            told = self._hub.log.facts(sequence_id)
            logger.exception("a hand-off could not be opened", extra=told)
            self._fail(sequence_id, InternalError("The hand-off could not be opened."))
        else:
            prompt.is_sending = True

    def on_layers(self, reports: SequenceOf[ComputedLayers]) -> None:
        for report in reports:
            self._for_one(report.chunk.sequence_id, partial(self._on_layers, report))

    def _on_layers(self, report: ComputedLayers) -> None:
        chunk = report.chunk
        prompt = self._prompts.get(chunk.sequence_id)
        if prompt is not None and prompt.is_sending:
            self._sender.layers_computed(
                chunk.sequence_id,
                chunk.num_computed_tokens,
                chunk.block_table,
                report.layer_end,
                report.done,
            )

    def on_step(self, report: StepReport) -> None:
        for chunk in report.chunks:
            self._for_one(chunk.sequence_id, partial(self._on_chunk, chunk))
        for delta in report.deltas:
            self._for_one(delta.sequence_id, partial(self._on_delta, delta))

    def _on_chunk(self, chunk: ComputedChunk) -> None:
        prompt = self._prompts.get(chunk.sequence_id)
        if prompt is not None and prompt.is_sending:
            self._sender.chunk_computed(
                chunk.sequence_id, chunk.num_computed_tokens, chunk.block_table, chunk.done
            )
            failpoint("prefill.after_chunk")

    def _on_delta(self, delta: TokenDelta) -> None:
        prompt = self._prompts.get(delta.sequence_id)
        if prompt is None or prompt.is_done:
            return
        self._hub.publish(prompt.gateway_id, [delta])
        if delta.finish_reason is not None or delta.error is not None:
            prompt.end()
            self._stop(delta.sequence_id, prompt)
            if delta.finish_reason is not None:
                self._log_end(prompt, delta.finish_reason.value)
        elif prompt.is_sending:
            failpoint("prefill.before_commit")
            self._sender.commit(delta.sequence_id, delta.token_ids[-1])

    # ---- reports of the sender --------------------------------------------------------

    def on_committed(self, sequence_id: str) -> None:
        failpoint("prefill.after_commit")
        prompt = self._prompts.get(sequence_id)
        if prompt is not None and not prompt.is_done:
            prompt.end()
            delta = TokenDelta(sequence_id=sequence_id, handed_off=True)
            self._hub.publish(prompt.gateway_id, [delta])
            self._log_end(prompt, "handed off", to=prompt.handoff.decode.name)

    def on_failed(self, sequence_id: str, error: ServingError) -> None:
        self._fail(sequence_id, error)

    def on_sources_free(self, sequence_id: str) -> None:
        self._release(sequence_id)

    # ---- endings ----------------------------------------------------------------------

    def _for_one(self, sequence_id: str, act: Callable[[], None]) -> None:
        """What breaks over one prompt ends that prompt: all others of a step, or of a gateway, hang
        on who goes through them."""
        facts = self._hub.log.facts(sequence_id)
        if not isolated(act, "the node broke over a prompt", logger, extra=facts):
            self._fail(sequence_id, InternalError("The node failed at this prompt."))

    def _log_end(self, prompt: Prompt, outcome: str, **facts: object) -> None:
        seconds = time.monotonic() - prompt.submitted_at
        self._hub.log.ended(prompt.request.sequence_id, outcome, seconds, **facts)

    def _fail(self, sequence_id: str, error: ServingError) -> None:
        prompt = self._prompts.get(sequence_id)
        if prompt is None or prompt.is_done:
            return
        prompt.end()
        self._hub.publish(prompt.gateway_id, [TokenDelta(sequence_id=sequence_id, error=error)])
        self._stop(sequence_id, prompt)

    def _stop(self, sequence_id: str, prompt: Prompt) -> None:
        """End what still runs for it here; blocks follow when nothing reads them."""
        if prompt.fetching is not None:
            prompt.fetching.cancel()
        unawaited(self._loop.call(lambda: self._scheduler.abort(sequence_id)))
        if prompt.is_sending:
            self._sender.abort(sequence_id)
        else:
            self._release(sequence_id)

    def _release(self, sequence_id: str) -> None:
        self._prompts.pop(sequence_id, None)
        unawaited(self._loop.call(lambda: self._observer.release(sequence_id)))
