"""Sequences, and what an engine's step does to them, without a model."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

from cluster.prefix_hash import root_hash
from cluster.request import SamplingParams, SequenceRequest
from engine.sequence import Sequence
from engine.stopping import check_finished

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from collections.abc import Set as AbstractSet

    from engine.block_manager import BlockManager
    from engine.schedule import ScheduledChunk, ScheduleDecision

ROOT = root_hash("model", b"")
BLOCK_SIZE = 4
MAX_MODEL_LEN = 1 << 20

_names = count()


def make_request(prompt: Iterable[int], *, priority: int = 0, **sampling: Any) -> SequenceRequest:
    name = f"s{next(_names)}"
    return SequenceRequest(
        sequence_id=name,
        request_id=name,
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(**{"max_tokens": 8, "seed": 0, **sampling}),
        priority=priority,
    )


def make_sequence(
    prompt: Iterable[int],
    *,
    block_size: int = BLOCK_SIZE,
    output: Iterable[int] = (),
    **options: Any,
) -> Sequence:
    request = make_request(prompt, **options)
    return Sequence(request, block_size=block_size, root=ROOT, output_token_ids=output)


def compute(block_manager: BlockManager, sequence: Sequence, num_tokens: int | None = None) -> bool:
    """Allocate and compute the first `num_tokens` tokens (default: all). False: no room."""
    num_tokens = sequence.num_tokens if num_tokens is None else num_tokens
    if not block_manager.allocate(sequence, num_tokens):
        return False
    sequence.num_computed_tokens = max(sequence.num_computed_tokens, num_tokens)
    block_manager.mark_computed(sequence)
    return True


@dataclass
class StepOutcome:
    sampled_sequences: list[Sequence]
    finished_sequences: list[Sequence]
    chunks: tuple[ScheduledChunk, ...] = ()


@dataclass(frozen=True)
class Flight:
    """A step that is launched and not collected."""

    chunks: tuple[ScheduledChunk, ...]
    sampled: list[Sequence]
    can_be_followed: bool = False


def launch_step(
    decision: ScheduleDecision, block_manager: BlockManager, *, can_be_followed: bool = False
) -> Flight:
    """As `engine.engine.Engine.launch` does. Checks what the engine relies on."""
    sampled = [chunk.sequence for chunk in decision.chunks if chunk.samples]
    for chunk in decision.chunks:
        sequence = chunk.sequence
        assert chunk.num_scheduled_tokens >= 1
        end = chunk.begin + chunk.num_scheduled_tokens
        assert end <= sequence.num_tokens + sequence.num_launched_draws
        covered = len(sequence.block_table) * block_manager.block_size
        assert covered >= end, "a token without a slot"
        sequence.num_launched_tokens += chunk.num_scheduled_tokens
    for sequence in sampled:
        sequence.num_launched_draws += 1
    block_manager.step_launched()
    return Flight(decision.chunks, sampled, can_be_followed)


def land_step(flight: Flight, block_manager: BlockManager) -> None:
    """It is in flight no more, collected or not."""
    for chunk in flight.chunks:
        chunk.sequence.num_launched_tokens -= chunk.num_scheduled_tokens
    for sequence in flight.sampled:
        sequence.num_launched_draws -= 1
    block_manager.step_collected()


def collect_step(
    flight: Flight,
    block_manager: BlockManager,
    next_token: Callable[[Sequence], int] = lambda sequence: 1000 + sequence.num_tokens,
    *,
    eos_token_ids: AbstractSet[int] = frozenset(),
) -> StepOutcome:
    """As `engine.engine.Engine.collect` does."""
    land_step(flight, block_manager)
    outcome = StepOutcome([], [])
    outcome.chunks = tuple(chunk for chunk in flight.chunks if not chunk.sequence.is_finished)
    for chunk in outcome.chunks:
        chunk.sequence.num_computed_tokens += chunk.num_scheduled_tokens
        assert chunk.sequence.num_computed_tokens <= chunk.sequence.num_tokens
        block_manager.mark_computed(chunk.sequence)
    for sequence in flight.sampled:
        if sequence.is_finished:
            continue
        outcome.sampled_sequences.append(sequence)
        sequence.append_token(next_token(sequence))
        finish = check_finished(sequence, eos_token_ids=eos_token_ids, max_model_len=MAX_MODEL_LEN)
        if finish is not None:
            sequence.finish(finish.reason, finish.stop_token_id)
            outcome.finished_sequences.append(sequence)
    return outcome


def run_step(
    decision: ScheduleDecision,
    block_manager: BlockManager,
    next_token: Callable[[Sequence], int] = lambda sequence: 1000 + sequence.num_tokens,
) -> StepOutcome:
    """Advance the chunks as `engine.engine.Engine.step` does."""
    return collect_step(launch_step(decision, block_manager), block_manager, next_token)
