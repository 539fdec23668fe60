"""Steps in flight: launched, computed by the device, collected.

Life of a step
    1. `launch` queues it: inputs, forward pass, draws, a copy of the tokens to the host. Its
       sequences note that tokens are being computed and drawn. It waits for nothing.
    2. Another one may be launched behind it, which takes the tokens of the first from the device
       and so follows it without a gap.
    3. `collect` waits for the tokens, the oldest step first, and for nothing else. Sequences get
       their tokens, end, and their full blocks can be hit.

Why two steps in flight are safe:
    - The host knows all of the second step but the tokens: positions, blocks, how it draws.
      What depends on the tokens (inputs, penalties) is worked out on the device.
    - A sequence that turns out to have ended, by a token or because it was aborted, computes one
      token too many. It goes to a slot of its own blocks and is discarded. A limit of length is
      known before, so no step goes beyond it.
    - Steps run in the order of their launch on one stream, so a later one may be given blocks
      that an earlier one still touches. Transfers run on other streams: blocks that are freed
      meanwhile go to nobody before the steps in flight are collected (`BlockManager.free`), and
      only collected KV is hit, held or sent.
    - What a launch that fails has queued is waited for: its sequences end, and their blocks go.
    - Only a decision made with nothing in flight preempts, so whatever a step in flight computes
      of a living sequence stays.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cluster.request import TokenDelta
from engine.sampler import not_finite
from engine.stopping import check_finished
from engine.tensor_parallel.failures import RankLost
from kernels.sample import NO_TOKEN

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Set as AbstractSet

    from cluster.request import TokenLogprobs
    from engine.block_manager import BlockManager
    from engine.model_runner import LaunchedStep, ModelRunner
    from engine.schedule import ScheduledChunk, ScheduleDecision
    from engine.sequence import Sequence

_MAX_IN_FLIGHT = 2


@dataclass(frozen=True, slots=True)
class InFlightStep:
    """A step that is launched and not collected."""

    chunks: tuple[ScheduledChunk, ...]
    launched: LaunchedStep
    can_be_followed: bool


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step did.

    `chunks`: those computed, without sequences that had ended before the step was collected.
    `deltas[i]` is of `sampled_sequences[i]`, whose next token was drawn. `finished_sequences`
    ended with it: their status is set, and they still hold their blocks. `done` (GPU) is recorded
    when all KV of the step is written; None means it is.
    """

    deltas: tuple[TokenDelta, ...]
    sampled_sequences: tuple[Sequence, ...]
    finished_sequences: tuple[Sequence, ...] = ()
    chunks: tuple[ScheduledChunk, ...] = ()
    done: torch.Event | None = None


class StepPipeline:
    """The steps of one engine. `overlaps`: whether one may be launched behind another."""

    def __init__(
        self,
        runner: ModelRunner,
        block_manager: BlockManager,
        eos_token_ids: AbstractSet[int],
        max_model_len: int,
    ) -> None:
        self.overlaps = False
        self._runner = runner
        self._block_manager = block_manager
        self._eos_token_ids = eos_token_ids
        self._max_model_len = max_model_len
        self._in_flight: deque[InFlightStep] = deque()

    def launch(
        self, decision: ScheduleDecision, on_layer: Callable[[int], None] | None
    ) -> InFlightStep:
        """See `Engine.launch`."""
        if len(self._in_flight) >= _MAX_IN_FLIGHT:
            raise RuntimeError("A step must be collected first.")
        with torch.inference_mode():
            launched = self._launched(decision, on_layer)
        for chunk in decision.chunks:
            chunk.sequence.num_launched_tokens += chunk.num_scheduled_tokens
        for sequence in launched.sampled:
            sequence.num_launched_draws += 1
        self._block_manager.step_launched()
        step = InFlightStep(decision.chunks, launched, self.overlaps)
        self._in_flight.append(step)
        return step

    def collect(self, step: InFlightStep) -> StepOutput:
        """See `Engine.collect`."""
        num_landing = len(self._in_flight)  # if this one fails, what is behind it is lost, too
        try:
            tokens = self._wait(step)
            num_landing = 1
        finally:
            for _ in range(num_landing):
                self._land(self._in_flight.popleft())
        chunks = tuple([chunk for chunk in step.chunks if not chunk.sequence.is_finished])
        block_size = self._block_manager.block_size
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.num_computed_tokens += chunk.num_scheduled_tokens
            if sequence.num_computed_tokens >= block_size * (sequence.num_registered_blocks + 1):
                self._block_manager.mark_computed(sequence)
        draws = step.launched.draws
        logprobs = {} if draws is None else draws.logprobs()
        sampled: list[Sequence] = []
        deltas: list[TokenDelta] = []
        for row, (sequence, token_id) in enumerate(zip(step.launched.sampled, tokens, strict=True)):
            if not sequence.is_finished:
                sampled.append(sequence)
                deltas.append(self._advance(sequence, token_id, logprobs.get(row)))
        finished = tuple([sequence for sequence in sampled if sequence.is_finished])
        return StepOutput(tuple(deltas), tuple(sampled), finished, chunks, step.launched.done)

    def _launched(
        self, decision: ScheduleDecision, on_layer: Callable[[int], None] | None
    ) -> LaunchedStep:
        """What of it was queued when it failed has ended before the error is told: who hears of
        that gives its blocks to others."""
        try:
            return self._runner.launch(
                decision.chunks,
                is_decode=decision.is_decode,
                follows=bool(self._in_flight),
                on_layer=on_layer,
            )
        except RankLost:
            raise  # the node ends, and the device may wait for that rank
        except Exception:
            self._runner.wait()
            raise

    def _wait(self, step: InFlightStep) -> list[int]:
        """Until all of the step is computed. Returns its tokens."""
        if not self._in_flight or self._in_flight[0] is not step:
            raise RuntimeError("Steps are collected in the order of their launch.")
        launched = step.launched
        if launched.draws is not None:
            return launched.draws.tokens()
        if launched.done is not None:
            launched.done.synchronize()
        return []

    def _land(self, step: InFlightStep) -> None:
        """It is in flight no more."""
        for chunk in step.chunks:
            chunk.sequence.num_launched_tokens -= chunk.num_scheduled_tokens
        for sequence in step.launched.sampled:
            sequence.num_launched_draws -= 1
        self._block_manager.step_collected()

    def _advance(
        self, sequence: Sequence, token_id: int, logprobs: TokenLogprobs | None
    ) -> TokenDelta:
        """Append the token, or end the sequence; say so."""
        if token_id == NO_TOKEN:
            error = not_finite()
            sequence.fail(error)
            return TokenDelta(sequence.sequence_id, error=error)
        sequence.token_ids.append(token_id)
        finish = check_finished(
            sequence, eos_token_ids=self._eos_token_ids, max_model_len=self._max_model_len
        )
        is_first = len(sequence.token_ids) - sequence.num_prompt_tokens == 1
        if finish is None and logprobs is None and not is_first:  # nearly always
            return TokenDelta(sequence.request.sequence_id, (token_id,))
        if finish is not None:
            sequence.finish(finish.reason, finish.stop_token_id)
        return TokenDelta(
            sequence_id=sequence.sequence_id,
            token_ids=(token_id,),
            logprobs=() if logprobs is None else (logprobs,),
            finish_reason=None if finish is None else finish.reason,
            stop_token_id=None if finish is None else finish.stop_token_id,
            num_cached_tokens=sequence.num_cached_tokens if is_first else None,
        )
