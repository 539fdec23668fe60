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

    from engine.block_manager import BlockManager
    from engine.schedule import ScheduleDecision

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


def run_step(
    decision: ScheduleDecision,
    block_manager: BlockManager,
    next_token: Callable[[Sequence], int] = lambda sequence: 1000 + sequence.num_tokens,
) -> StepOutcome:
    """Advance the chunks as `engine.engine.Engine.step` does. Checks what the engine relies on."""
    sampled = [chunk.sequence for chunk in decision.chunks if chunk.samples]
    for chunk in decision.chunks:
        sequence = chunk.sequence
        assert chunk.num_scheduled_tokens >= 1
        sequence.num_computed_tokens += chunk.num_scheduled_tokens
        assert sequence.num_computed_tokens <= sequence.num_tokens
        covered = len(sequence.block_table) * block_manager.block_size
        assert covered >= sequence.num_computed_tokens, "a token without a slot"
        block_manager.mark_computed(sequence)
    for sequence in sampled:
        sequence.append_token(next_token(sequence))
        finish = check_finished(sequence, eos_token_ids=set(), max_model_len=MAX_MODEL_LEN)
        if finish is not None:
            sequence.finish(finish.reason, finish.stop_token_id)
    return StepOutcome(sampled)
