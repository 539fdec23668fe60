"""What tests of a whole engine share: a greedy driver. Its checkpoints: `tests/checkpoints.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import pytest

from cluster.prefix_hash import root_hash
from cluster.request import SamplingParams, SequenceRequest
from engine.schedule import ScheduledChunk, ScheduleDecision
from engine.sequence import Sequence
from tests.checkpoints import Expected, OpenEngine

if TYPE_CHECKING:
    from engine.engine import Engine

__all__ = ["Expected", "OpenEngine", "RunGreedy"]

RunGreedy = Callable[..., list[Sequence]]


@pytest.fixture(scope="session")
def run_greedy() -> RunGreedy:
    return _run_greedy


def _run_greedy(
    engine: Engine, prompts: Iterable[list[int]], *, chunk: int, num_tokens: int
) -> list[Sequence]:
    """Run prompts together as a scheduler would: chunks of at most `chunk` tokens in a step,
    then decode. The sequences come back finished, their blocks freed."""
    sequences = [
        Sequence(
            SequenceRequest(
                sequence_id=f"s{index}",
                request_id=f"r{index}",
                prompt_token_ids=tuple(prompt),
                sampling=SamplingParams(
                    max_tokens=num_tokens, seed=0, temperature=0.0, ignore_eos=True
                ),
            ),
            block_size=engine.config.block_size,
            root=root_hash("test", b""),
        )
        for index, prompt in enumerate(prompts)
    ]
    running = list(sequences)
    while running:
        engine.step(_decide(engine, running, chunk))
        for sequence in [each for each in running if each.is_finished]:
            running.remove(sequence)
            engine.block_manager.free(sequence)
    engine.block_manager.check_integrity()
    return sequences


def _decide(engine: Engine, running: list[Sequence], chunk: int) -> ScheduleDecision:
    prefilling = [each for each in running if each.num_output_tokens == 0]
    chunks = []
    budget = chunk
    for sequence in prefilling or running:
        if not prefilling:
            budget = 1
        if budget == 0:
            break
        covered = max(1, sequence.num_computed_tokens)
        assert engine.block_manager.allocate(sequence, covered)
        length = min(budget, sequence.num_uncomputed_tokens)
        assert engine.block_manager.allocate(sequence, sequence.num_computed_tokens + length)
        chunks.append(ScheduledChunk(sequence, length))
        budget -= length
    return ScheduleDecision(chunks=tuple(chunks))
