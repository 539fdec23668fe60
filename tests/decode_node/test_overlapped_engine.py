"""A real engine under the loop: steps launched ahead put out what steps run one by one do."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest

from cluster.prefix_hash import root_hash
from cluster.request import FinishReason, SamplingParams, SequenceRequest
from decode_node.scheduler import DecodeScheduler
from engine.loop import EngineLoop
from engine.schedule import ScheduledChunk, ScheduleDecision
from engine.sequence import Sequence

if TYPE_CHECKING:
    from collections.abc import Iterator

    from engine.engine import Engine
    from tests.checkpoints import Expected, OpenEngine

# Each kind of row: all share batches, so a batch has rows that change logits, and rows that end.
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.9},
    {"temperature": 1.2, "top_p": 0.7},
    {"temperature": 0.8, "top_k": 9, "num_logprobs": 2},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 0.0, "logit_bias": ((3, 2.0), (9, -4.0))},
    {"temperature": 1.0, "min_tokens": 5, "stop_token_ids": (7, 8, 9, 10, 11)},
    {"temperature": 1.5, "stop_token_ids": tuple(range(40))},
]
PENALIZED: list[dict[str, Any]] = [
    {"temperature": 0.7, "repetition_penalty": 1.3},
    {"temperature": 0.0, "frequency_penalty": 0.9, "presence_penalty": 0.4},
    {"temperature": 0.0, "frequency_penalty": -1.5},
    {"temperature": 1.0, "top_p": 0.8, "repetition_penalty": 0.8, "presence_penalty": -1.0},
]


class Listener:
    def __init__(self) -> None:
        self.told: dict[str, list[object]] = {}

    def before_step(self, decision: object) -> None: ...
    def after_step(self, decision: object, output: object) -> None: ...

    def idle(self) -> None:
        pass

    def settled(self, deltas: Any) -> None:
        for delta in deltas:
            best = [each.top[0][0] for each in delta.logprobs if each.top]
            told = (*delta.token_ids, *best, delta.finish_reason, delta.stop_token_id)
            self.told.setdefault(delta.sequence_id, []).append(told)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], scope="module")
def engine(request: pytest.FixtureRequest, open_engine: OpenEngine) -> Iterator[Engine]:
    engine = open_engine(
        "qwen3", device=request.param, max_num_seqs=12, kv_cache_memory_bytes=64 << 20
    )
    overlaps = engine.overlaps
    yield engine
    engine.overlaps = overlaps


def start(engine: Engine, index: int, prompt: list[int], **sampling: Any) -> Sequence:
    settings = {"max_tokens": 4 + 5 * index % 23, "seed": index, "ignore_eos": True} | sampling
    return Sequence(
        SequenceRequest(
            sequence_id=f"s{index}",
            request_id=f"r{index}",
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(**settings),
        ),
        block_size=engine.config.block_size,
        root=root_hash("test", b""),
    )


def run(
    engine: Engine, sequences: list[Sequence], *, overlaps: bool
) -> tuple[dict[str, list[object]], int]:
    """What the loop told of these sequences, the later of which join while others run; and how
    many steps were launched before the last one was collected."""
    engine.overlaps = overlaps
    engine.block_manager.reset_prefix_cache()
    listener = Listener()
    scheduler = DecodeScheduler(
        engine.block_manager,
        engine.max_num_batched_tokens,
        engine.max_num_seqs,
        max_model_len=engine.max_model_len,
    )
    loop = EngineLoop(engine, scheduler, listener, on_fatal=lambda error: None)
    waiting = list(sequences)
    ahead = 0
    while waiting or loop._is_busy():
        if waiting and len(waiting) + loop.stats.num_steps >= len(sequences):
            scheduler.add(waiting.pop(0))
        loop._step()
        ahead += loop._flight is not None
        engine.block_manager.check_integrity()
    assert engine.block_manager.num_free_blocks == engine.block_manager.num_blocks
    return listener.told, ahead


@pytest.mark.parametrize("kinds", [KINDS[:1], KINDS[:5], KINDS, PENALIZED])
def test_steps_launched_ahead_change_no_token(
    engine: Engine, expected: Expected, kinds: list[dict[str, Any]]
) -> None:
    prompts = [case["prompt"][:60] for case in expected["qwen3"]]

    def sequences() -> list[Sequence]:
        return [
            start(engine, index, prompts[index % len(prompts)], **kinds[index % len(kinds)])
            for index in range(2 * len(prompts))
        ]

    one_by_one, none = run(engine, sequences(), overlaps=False)
    overlapped, many = run(engine, sequences(), overlaps=True)
    assert none == 0
    assert many > 10
    assert overlapped.keys() == one_by_one.keys()
    for name, told in one_by_one.items():
        assert overlapped[name] == told


@pytest.mark.parametrize("seed", range(3))
def test_rows_that_come_go_and_are_preempted_in_any_order_change_no_token(
    open_engine: OpenEngine, expected: Expected, seed: int
) -> None:
    """Each gets the tokens that it has alone; the pool is too small for all."""
    chance = random.Random(seed)
    engine = open_engine("qwen3", max_num_seqs=6, max_model_len=128, num_gpu_blocks_override=8)
    engine.overlaps = True
    scheduler = DecodeScheduler(
        engine.block_manager, 40, engine.max_num_seqs, max_model_len=engine.max_model_len
    )
    loop = EngineLoop(engine, scheduler, Listener(), on_fatal=lambda error: None)
    cases = [case for case in expected["qwen3"] if len(case["prompt"]) < 60]
    started: list[tuple[Sequence, list[int]]] = []
    while len(started) < 50 or loop._is_busy():
        if len(started) < 50 and chance.random() < 0.7:
            case, length = chance.choice(cases), chance.choice((1, 9, 24, 24))
            sequence = start(
                engine, len(started), case["prompt"], temperature=0.0, max_tokens=length
            )
            started.append((sequence, case["tokens"][:length]))
            scheduler.add(sequence)
        if chance.random() < 0.05 and scheduler.sequences():
            scheduler.abort(chance.choice(scheduler.sequences()).sequence_id)
        if loop._is_busy():
            loop._step()
        engine.block_manager.check_integrity()
    assert loop.stats.num_preemptions > 0
    assert engine.block_manager.num_free_blocks == engine.block_manager.num_blocks
    for sequence, tokens in started:
        output = sequence.output_token_ids
        assert output == tokens[: len(output)]
        assert len(output) == len(tokens) or sequence.finish_reason is FinishReason.ABORT


def test_greedy_tokens_launched_ahead_equal_the_reference(
    engine: Engine, expected: Expected
) -> None:
    cases = expected["qwen3"]
    sequences = [
        start(engine, index, case["prompt"], temperature=0.0, max_tokens=24)
        for index, case in enumerate(cases)
    ]
    run(engine, sequences, overlaps=True)
    outputs = [sequence.output_token_ids for sequence in sequences]
    assert outputs == [case["tokens"] for case in cases]


def test_what_is_aborted_in_flight_is_not_heard_of_again(engine: Engine) -> None:
    engine.overlaps = True
    manager = engine.block_manager
    manager.reset_prefix_cache()
    aborted, other = (
        start(engine, index, list(range(10 * index, 10 * index + 20)), max_tokens=50)
        for index in range(2)
    )
    for sequence in (aborted, other):
        assert manager.allocate(sequence, 60)
        engine.step(ScheduleDecision((ScheduledChunk(sequence, sequence.num_tokens),)))
    rows = tuple(ScheduledChunk(sequence, 1) for sequence in (aborted, other))
    first = engine.launch(ScheduleDecision(rows))
    second = engine.launch(ScheduleDecision(rows))
    tokens = list(aborted.token_ids)
    blocks = set(aborted.block_table)
    aborted.fail(RuntimeError("gone"))  # type: ignore[arg-type]
    manager.free(aborted)
    free = manager.num_free_blocks
    assert engine.collect(first).sampled_sequences == (other,)
    assert manager.num_free_blocks == free, "the second step still writes there"
    assert engine.collect(second).sampled_sequences == (other,)
    assert manager.num_free_blocks == free + len(blocks)
    assert aborted.token_ids == tokens
    assert other.num_output_tokens == 3
    assert (aborted.num_launched_tokens, aborted.num_launched_draws) == (0, 0)
    manager.free(other)
    manager.check_integrity()


def test_a_third_step_must_wait(engine: Engine) -> None:
    engine.overlaps = True
    sequence = start(engine, 0, list(range(10, 20)), max_tokens=50)
    assert engine.block_manager.allocate(sequence, 30)
    first = engine.launch(ScheduleDecision((ScheduledChunk(sequence, 10),)))
    row = ScheduleDecision((ScheduledChunk(sequence, 1),))
    second = engine.launch(row)
    with pytest.raises(RuntimeError, match="collected first"):
        engine.launch(row)
    with pytest.raises(RuntimeError, match="order"):
        engine.collect(second)
    assert sequence.num_launched_draws == 0, "after an error no step is in flight"
    assert first is not second
    engine.block_manager.free(sequence)
    engine.block_manager.check_integrity()
