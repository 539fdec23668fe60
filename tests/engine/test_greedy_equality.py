"""The engine's greedy tokens are those of `transformers`, token for token, in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.checkpoints import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from engine.sequence import Sequence
    from tests.engine.conftest import Expected, OpenEngine, RunGreedy


def _outputs(sequences: Iterable[Sequence]) -> list[list[int]]:
    return [sequence.output_token_ids for sequence in sequences]


@pytest.mark.parametrize("chunk", [32, 512, 1024])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_sixteen_prompts_equals_the_reference(
    family: str, chunk: int, expected: Expected, open_engine: OpenEngine, run_greedy: RunGreedy
) -> None:
    cases = expected[family]
    sequences = run_greedy(
        open_engine(family), [case["prompt"] for case in cases], chunk=chunk, num_tokens=24
    )
    assert _outputs(sequences) == [case["tokens"] for case in cases]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_run_one_by_one_equal_the_reference(
    family: str, expected: Expected, open_engine: OpenEngine, run_greedy: RunGreedy
) -> None:
    engine = open_engine(family, enable_prefix_caching=False)
    for case in expected[family][:6]:
        (sequence,) = run_greedy(engine, [case["prompt"]], chunk=32, num_tokens=24)
        assert sequence.output_token_ids == case["tokens"]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_do_not_depend_on_what_the_prefix_cache_holds(
    family: str, expected: Expected, open_engine: OpenEngine, run_greedy: RunGreedy
) -> None:
    cases = expected[family]
    engine = open_engine(family)
    prompts = [case["prompt"] for case in cases]
    for index, prompt in enumerate(prompts[:8]):  # a later one hits what an earlier one left
        (sequence,) = run_greedy(engine, [prompt], chunk=512, num_tokens=24)
        assert sequence.output_token_ids == cases[index]["tokens"]
    again = run_greedy(engine, prompts, chunk=512, num_tokens=24)
    assert _outputs(again) == [case["tokens"] for case in cases]
    # A prompt of whole blocks, all of them cached, still computes its last block.
    hits = {len(each.prompt_token_ids): each.num_cached_tokens for each in again}
    assert {length: hits[length] for length in (1, 15, 16, 17, 32, 96)} == {
        1: 0,
        15: 0,
        16: 0,
        17: 16,
        32: 16,
        96: 80,
    }


def test_blocks_of_another_size_give_the_same_tokens(
    expected: Expected, open_engine: OpenEngine, run_greedy: RunGreedy
) -> None:
    cases = expected["mistral"]
    engine = open_engine("mistral", block_size=32)
    sequences = run_greedy(engine, [case["prompt"] for case in cases], chunk=48, num_tokens=24)
    assert _outputs(sequences) == [case["tokens"] for case in cases]


def test_bfloat16_stays_close_to_float32(
    expected: Expected, open_engine: OpenEngine, run_greedy: RunGreedy
) -> None:
    """Not token for token: the types round differently. But most first tokens must agree."""
    cases = expected["llama3"]
    engine = open_engine("llama3", dtype="bfloat16")
    sequences = run_greedy(engine, [case["prompt"] for case in cases], chunk=1024, num_tokens=1)
    same = [
        sequence.output_token_ids[0] == case["tokens"][0]
        for sequence, case in zip(sequences, cases, strict=True)
    ]
    assert sum(same) >= 12
