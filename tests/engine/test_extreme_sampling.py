"""Whatever the API allows for one sequence is drawn, and changes nothing for those beside it."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest

from cluster.errors import InvalidRequest
from cluster.prefix_hash import root_hash
from cluster.request import MAX_SEED, SamplingParams, SequenceRequest
from engine.schedule import ScheduledChunk, ScheduleDecision
from engine.sequence import Sequence

if TYPE_CHECKING:
    from engine.engine import Engine
    from tests.engine.conftest import OpenEngine

NUM_BATCHES, NUM_TOKENS = 40, 4
ENDS: dict[str, tuple[Any, ...]] = {
    "temperature": (0.0, 1e-45, 1e-38, 1e-8, 100.0),
    "top_p": (1e-45, 1e-8, 1.0),
    "min_p": (1e-45, 1.0),
    "top_k": (1, 2**31 - 1),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "num_logprobs": (0, 20),
    "min_tokens": (NUM_TOKENS,),
    "seed": (0, MAX_SEED - 1),
}


@pytest.fixture(scope="module")
def engine(open_engine: OpenEngine) -> Engine:
    return open_engine("qwen3", max_model_len=128)


def drawn(draw: random.Random, vocab_size: int) -> dict[str, Any]:
    options = {name: draw.choice(ends) for name, ends in ENDS.items() if draw.random() < 0.4}
    if draw.random() < 0.4:
        ids = draw.sample(range(vocab_size), draw.choice((1, vocab_size)))
        options["logit_bias"] = tuple((each, draw.choice((-100.0, 100.0))) for each in ids)
    if draw.random() < 0.3:
        options["stop_token_ids"] = tuple(range(vocab_size))[:128]
    return options


def sequence_of(number: int, **options: Any) -> Sequence:
    name = f"s{number}"
    settings = {"max_tokens": NUM_TOKENS, "seed": 0, "temperature": 0.0, "ignore_eos": True}
    request = SequenceRequest(
        sequence_id=name,
        request_id=name,
        prompt_token_ids=(7, 8, 9 + number),
        sampling=SamplingParams(**{**settings, **options}),
    )
    return Sequence(request, block_size=16, root=root_hash("test", name.encode()))


def run(engine: Engine, sequences: list[Sequence]) -> None:
    while live := [each for each in sequences if not each.is_finished]:
        chunks = []
        for each in live:
            assert engine.block_manager.allocate(each, each.num_tokens)
            chunks.append(ScheduledChunk(each, each.num_uncomputed_tokens))
        decision = ScheduleDecision(tuple(chunks))
        engine.collect(engine.launch(decision))
    for each in sequences:
        engine.block_manager.free(each)


def test_any_end_of_what_is_allowed_is_drawn_beside_a_plain_sequence(engine: Engine) -> None:
    alone = sequence_of(0)
    run(engine, [alone])
    draw = random.Random(5)
    for _ in range(NUM_BATCHES):
        others = [
            sequence_of(1 + index, **drawn(draw, engine.model_config.vocab_size))
            for index in range(4)
        ]
        plain = sequence_of(0)
        run(engine, [plain, *others])
        assert plain.output_token_ids == alone.output_token_ids
        for other in others:
            assert other.error is None, other.sampling


def test_a_penalty_that_would_leave_no_finite_logits_is_refused() -> None:
    """The node could not tell it from a broken model, and forgets what such a model has cached."""
    with pytest.raises(InvalidRequest, match="repetition_penalty"):
        SamplingParams(max_tokens=1, seed=0, repetition_penalty=1e-38)
