"""What a step does to the sequences it computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch

from cluster.errors import ConfigError
from cluster.prefix_hash import root_hash
from cluster.request import FinishReason, SamplingParams, SequenceRequest
from cluster.startup import StartupReport
from engine.config import EngineConfig
from engine.engine import Engine
from engine.schedule import ScheduledChunk, ScheduleDecision
from engine.sequence import Sequence, SequenceStatus

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from engine.step_pipeline import StepOutput
    from tests.engine.conftest import OpenEngine

Start = Callable[..., Sequence]


@pytest.fixture(scope="module")
def engine(open_engine: OpenEngine) -> Engine:
    return open_engine("qwen3", max_model_len=128)


@pytest.fixture
def start(engine: Engine) -> Iterator[Start]:
    """`start(prompt, ...)`: a sequence with blocks for its prompt, freed after the test."""
    started: list[Sequence] = []

    def start(prompt: Iterable[int], **sampling: Any) -> Sequence:
        settings: dict[str, Any] = {
            "max_tokens": 4,
            "seed": 0,
            "temperature": 0.0,
            "ignore_eos": True,
        } | sampling
        name = f"s{len(started)}"
        sequence = Sequence(
            SequenceRequest(
                sequence_id=name,
                request_id=name,
                prompt_token_ids=tuple(prompt),
                sampling=SamplingParams(**settings),
            ),
            block_size=engine.config.block_size,
            root=root_hash("test", name.encode()),
        )
        assert engine.block_manager.allocate(sequence, sequence.num_prompt_tokens)
        started.append(sequence)
        return sequence

    yield start
    for sequence in started:
        engine.block_manager.free(sequence)
    engine.block_manager.reset_prefix_cache()
    engine.block_manager.check_integrity()


def step(engine: Engine, *chunks: tuple[Sequence, int]) -> StepOutput:
    for sequence, length in chunks:
        assert engine.block_manager.allocate(sequence, sequence.num_computed_tokens + length)
    return engine.step(ScheduleDecision(tuple(ScheduledChunk(*chunk) for chunk in chunks)))


def test_a_chunk_that_stops_short_of_the_prompts_end_draws_nothing(
    engine: Engine, start: Start
) -> None:
    sequence = start(range(10, 50))
    output = step(engine, (sequence, 32))
    assert output.deltas == ()
    assert output.sampled_sequences == ()
    assert sequence.num_computed_tokens == 32
    assert sequence.num_output_tokens == 0


def test_only_chunks_that_end_draw_and_in_their_order(engine: Engine, start: Start) -> None:
    first, second, third = start(range(10, 30)), start(range(20, 60)), start(range(5, 8))
    output = step(engine, (first, 20), (second, 10), (third, 3))
    assert output.sampled_sequences == (first, third)
    assert [delta.sequence_id for delta in output.deltas] == ["s0", "s2"]
    assert [delta.token_ids for delta in output.deltas] == [
        (first.token_ids[-1],),
        (third.token_ids[-1],),
    ]


def test_the_first_delta_tells_how_much_was_cached(engine: Engine, start: Start) -> None:
    sequence = start(range(10, 50))
    assert step(engine, (sequence, 40)).deltas[0].num_cached_tokens == 0
    assert step(engine, (sequence, 1)).deltas[0].num_cached_tokens is None


def test_computed_blocks_can_be_hit_as_soon_as_they_are_full(engine: Engine, start: Start) -> None:
    sequence = start(range(10, 50))
    step(engine, (sequence, 32))
    assert len(engine.block_manager.match_prefix(sequence.block_hashes)) == 2


def test_max_tokens_ends_a_sequence_and_leaves_its_blocks(engine: Engine, start: Start) -> None:
    sequence = start(range(10, 20), max_tokens=2)
    step(engine, (sequence, 10))
    (delta,) = step(engine, (sequence, 1)).deltas
    assert delta.finish_reason is FinishReason.LENGTH
    assert sequence.status is SequenceStatus.FINISHED
    assert sequence.block_table


def test_a_stop_token_is_named(engine: Engine, start: Start) -> None:
    probe = start(range(10, 20))
    step(engine, (probe, 10))
    drawn = probe.token_ids[-1]
    sequence = start(range(10, 20), stop_token_ids=(drawn,))
    (delta,) = step(engine, (sequence, 10)).deltas
    assert delta.finish_reason is FinishReason.STOP
    assert delta.stop_token_id == drawn


def test_the_models_context_ends_a_sequence(engine: Engine, start: Start) -> None:
    sequence = start(range(100, 226), max_tokens=100)
    step(engine, (sequence, 126))
    assert not sequence.is_finished
    (delta,) = step(engine, (sequence, 1)).deltas
    assert delta.finish_reason is FinishReason.LENGTH
    assert sequence.num_tokens == 128


def test_the_kv_of_each_layer_is_announced_when_it_is_written(engine: Engine, start: Start) -> None:
    sequence = start(range(10, 30))
    seen: list[tuple[int, list[bool]]] = []

    def on_layer(layer: int) -> None:
        block = sequence.block_table[0]
        written = engine.kv_cache.tensor[:, block].abs().sum(dim=(1, 2, 3, 4)) > 0
        seen.append((layer, written.tolist()))

    engine.kv_cache.tensor.zero_()
    engine.step(ScheduleDecision((ScheduledChunk(sequence, 20),)), on_layer=on_layer)
    assert seen == [(0, [True, False]), (1, [True, True])]


def test_decode_gives_the_tokens_of_a_whole_prefill(engine: Engine, start: Start) -> None:
    """A sequence that lost its blocks is computed again in one chunk and continues alike."""
    sequence = start(range(10, 30), max_tokens=100)
    step(engine, (sequence, 20))
    for _ in range(20):
        step(engine, (sequence, 1))
    again = start(sequence.token_ids[:-1], max_tokens=100)
    step(engine, (again, again.num_tokens))
    assert again.token_ids == sequence.token_ids


def test_kv_is_written_outside_inference_mode_too(engine: Engine) -> None:
    """What a node receives from a peer is scattered into the pool by another thread."""
    engine.kv_cache.as_bytes()[:, 0].copy_(torch.zeros(1, dtype=torch.uint8))


def test_progress_names_every_phase(checkpoints: Path) -> None:
    facts: list[Mapping[str, Any]] = []
    config = EngineConfig(model=checkpoints / "qwen2", device="cpu", num_threads=1)
    Engine.create(config, progress=StartupReport(sink=facts.append))
    assert [fact["phase"] for fact in facts if fact["event"] == "begin"] == [
        "load weights",
        "allocate KV",
        "warm up",
    ]


def test_dummy_weights_need_only_the_config(checkpoints: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((checkpoints / "llama3" / "config.json").read_bytes())
    config = EngineConfig(model=tmp_path, device="cpu", load_format="dummy", num_threads=1)
    engine = Engine.create(config, progress=StartupReport(sink=lambda fact: None))
    assert engine.kv_cache.num_blocks == engine.block_manager.num_blocks
    with pytest.raises(ConfigError, match="holds neither"):
        Engine.create(
            EngineConfig(model=tmp_path, device="cpu"),
            progress=StartupReport(sink=lambda fact: None),
        )


def test_a_context_that_does_not_fit_the_pool_is_refused_at_start(open_engine: OpenEngine) -> None:
    message = r"is 488\.3 KiB, but .* takes 1\.0 MiB: lower --max-model-len to at most 480"
    with pytest.raises(ConfigError, match=message):
        open_engine("qwen3", kv_cache_memory_bytes=500_000)


def test_the_fingerprint_is_of_the_weights(open_engine: OpenEngine, engine: Engine) -> None:
    assert engine.weights_fingerprint == open_engine("qwen3").weights_fingerprint
    assert engine.weights_fingerprint != open_engine("qwen2").weights_fingerprint


def test_a_sequence_that_came_back_to_other_blocks_decodes_from_them(
    engine: Engine, start: Start
) -> None:
    """What was drawn last was drawn for it too, but from blocks that others have now."""
    manager = engine.block_manager
    alone = start(range(10, 50), max_tokens=8)
    preempted = start(range(10, 50), max_tokens=8)
    for sequence in (alone, preempted):
        for length in (40, 1, 1):
            step(engine, (sequence, length))
    manager.preempt(preempted)
    manager.reset_prefix_cache()
    taker = start(range(60, 120))
    step(engine, (taker, 59))
    num_tokens = preempted.num_tokens
    assert manager.allocate(preempted, num_tokens + 1)
    decisions = [
        ScheduleDecision((ScheduledChunk(preempted, length),)) for length in (num_tokens - 1, 1)
    ]
    engine.overlaps = True
    all_but_last, last = [engine.launch(decision) for decision in decisions]
    engine.collect(all_but_last)
    engine.collect(last)
    engine.overlaps = False
    step(engine, (alone, 1))
    assert preempted.output_token_ids == alone.output_token_ids
