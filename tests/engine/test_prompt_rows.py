"""Short ends of prompts as rows of a decode step: which rows, and that no token depends on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from engine.model_runner import ModelRunner
from engine.prompt_rows import PromptRow, rows_of, tables_of
from engine.schedule import ScheduledChunk, ScheduleDecision
from tests.checkpoints import FAMILIES
from tests.sequences import BLOCK_SIZE, make_sequence

if TYPE_CHECKING:
    from collections.abc import Iterable

    from engine.engine import Engine
    from engine.sequence import Sequence
    from tests.engine.conftest import Expected, OpenEngine, RunGreedy

EVERYTHING = 1 << 30


def chunk_of(length: int, computed: int, num_tokens: int | None = None) -> ScheduledChunk:
    """The tokens of a prompt behind `computed`, or so many of them."""
    sequence = make_sequence(range(100, 100 + length))
    sequence.num_computed_tokens = computed
    sequence.block_table = [7 * block for block in range(-(-length // BLOCK_SIZE))]
    return ScheduledChunk(sequence, num_tokens or length - computed)


def rows(
    *chunks: ScheduledChunk, max_rows: int = 64, max_read_tokens: int = EVERYTHING
) -> list[PromptRow] | None:
    return rows_of(chunks, max_rows=max_rows, max_read_tokens=max_read_tokens)


def test_each_token_is_a_row_and_those_that_draw_come_first() -> None:
    first, second = chunk_of(9, 6), chunk_of(5, 4)
    assert rows(first, second) == [
        (first.sequence, 9),
        (second.sequence, 5),
        (first.sequence, 7),
        (first.sequence, 8),
    ]


def test_a_row_has_its_token_and_the_blocks_up_to_it() -> None:
    chunk = chunk_of(9, 3)
    last, first = PromptRow(chunk.sequence, 9), PromptRow(chunk.sequence, 4)
    assert first.token_id == 103
    tables = tables_of([last, first], BLOCK_SIZE)
    assert [(row, column, list(ids)) for row, column, ids in tables] == [
        (0, 0, [0, 7, 14]),
        (1, 0, [0]),
    ]


def test_chunks_that_are_long_or_draw_nothing_or_read_much_are_no_rows() -> None:
    chunk, other = chunk_of(9, 6), chunk_of(8, 6)
    assert rows(chunk, other, max_rows=5) is not None
    assert rows(chunk, other, max_rows=4) is None
    assert rows(chunk_of(9, 2, 3)) is None
    assert rows(chunk, chunk_of(9, 2, 3)) is None
    assert rows(chunk, max_read_tokens=7 + 8 + 9) is not None
    assert rows(chunk, max_read_tokens=7 + 8 + 8) is None


@dataclass
class Used:
    num_steps: int = 0


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Used:
    """How many steps were launched as rows."""
    used, launch = Used(), ModelRunner._launch_prompt_rows

    def counted(self: ModelRunner, sampled: list[Sequence], rows: list[PromptRow]) -> object:
        used.num_steps += 1
        return launch(self, sampled, rows)

    monkeypatch.setattr(ModelRunner, "_launch_prompt_rows", counted)
    return used


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_with_a_cached_beginning_give_the_tokens_of_the_reference(
    family: str,
    device: str,
    expected: Expected,
    open_engine: OpenEngine,
    run_greedy: RunGreedy,
    used: Used,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cases = expected[family]
    prompts = [case["prompt"] for case in cases]
    engine = open_engine(family, device=device, kv_cache_memory_bytes=1 << 26)
    monkeypatch.setattr(engine._runner, "max_prompt_rows", engine.max_num_seqs)
    run_greedy(engine, prompts, chunk=512, num_tokens=1)
    used.num_steps = 0
    for prompt, case in zip(prompts, cases, strict=True):
        (sequence,) = run_greedy(engine, [prompt], chunk=512, num_tokens=24)
        assert sequence.output_token_ids == case["tokens"]
    left = [(len(prompt) - 1) % 16 + 1 for prompt in prompts]
    assert used.num_steps == sum(length > 1 for length in left), "one token is a decode step"
    ends = [prompt for prompt in prompts if len(prompt) % 16 in (1, 2)]
    several = run_greedy(engine, ends, chunk=512, num_tokens=24)
    assert [each.output_token_ids for each in several] == [
        case["tokens"] for case in cases if len(case["prompt"]) % 16 in (1, 2)
    ]


def test_streams_go_on_with_their_own_tables_behind_the_rows_of_a_prompt(
    device: str,
    expected: Expected,
    open_engine: OpenEngine,
    used: Used,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    long = max(expected["llama3"], key=lambda case: len(case["prompt"]))
    engine = open_engine("llama3", device=device, kv_cache_memory_bytes=1 << 26)
    monkeypatch.setattr(engine._runner, "max_prompt_rows", engine.max_num_seqs)
    first, second = make_prompt(long["prompt"]), make_prompt(range(200, 212))
    step(engine, [first], first.num_prompt_tokens)
    step(engine, [first], 1)
    step(engine, [second], second.num_prompt_tokens)
    assert used.num_steps == 1
    for _ in range(6):
        step(engine, [first, second], 1)
    assert first.output_token_ids == long["tokens"][:8]
    assert second.num_output_tokens == 7
    for sequence in (first, second):
        engine.block_manager.free(sequence)


def make_prompt(prompt: Iterable[int]) -> Sequence:
    return make_sequence(prompt, block_size=16, max_tokens=24, temperature=0.0, ignore_eos=True)


def step(engine: Engine, sequences: list[Sequence], num_tokens: int) -> None:
    for sequence in sequences:
        covered = sequence.num_computed_tokens + num_tokens
        assert engine.block_manager.allocate(sequence, covered)
    engine.step(ScheduleDecision(tuple(ScheduledChunk(each, num_tokens) for each in sequences)))
