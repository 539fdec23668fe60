"""Any batch of sequences: each row is what it would be alone, and what the reference says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.sampler_reference import VOCAB, make_sampler, random_logits, reference
from tests.sequences import make_sequence


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


samplings = st.fixed_dictionaries(
    {"seed": st.integers(0, 2**63 - 1), "max_tokens": st.just(100)},
    optional={
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 1.7]),
        "top_p": st.sampled_from([0.1, 0.5, 0.9, 0.99]),
        "top_k": st.sampled_from([1, 3, 20, VOCAB, 500]),
        "min_p": st.sampled_from([0.05, 0.3, 1.0]),
        "repetition_penalty": st.sampled_from([0.7, 1.3]),
        "presence_penalty": st.sampled_from([-1.0, 1.5]),
        "frequency_penalty": st.sampled_from([-0.5, 0.7]),
        "logit_bias": st.just(((7, 4.0), (8, -100.0), (9, 1.0))),
        "min_tokens": st.sampled_from([1, 50]),
        "stop_token_ids": st.just((5, 6)),
        "ignore_eos": st.booleans(),
        "num_logprobs": st.sampled_from([0, 3, 20]),
    },
)
token_lists = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12)
batches = st.lists(st.tuples(samplings, token_lists, token_lists), min_size=1, max_size=6)


@settings(max_examples=300, deadline=None)
@given(batches, st.integers(0, 10_000))
def test_every_row_of_a_mixed_batch_is_what_the_plain_reference_draws(
    batch: list[tuple[dict[str, Any], list[int], list[int]]], seed: int
) -> None:
    sequences = [make_sequence(prompt, output=out, **s) for s, prompt, out in batch]
    logits = random_logits(len(batch), seed=seed)
    tokens = make_sampler().sample(logits, sequences)
    assert [token.token_id for token in tokens] == [
        reference(row, sequence) for row, sequence in zip(logits, sequences, strict=True)
    ]


@settings(max_examples=100, deadline=None)
@given(batches, st.integers(0, 10_000))
def test_a_row_does_not_depend_on_its_neighbours(
    batch: list[tuple[dict[str, Any], list[int], list[int]]], seed: int
) -> None:
    """Bitwise: log-probabilities too."""
    logits = random_logits(len(batch), seed=seed)
    sampler = make_sampler()
    together = sampler.sample(logits, [make_sequence(p, output=o, **s) for s, p, o in batch])
    for index, (sampling, prompt, output) in enumerate(batch):
        alone = make_sequence(prompt, output=output, **sampling)
        assert sampler.sample(logits[index : index + 1], [alone]) == [together[index]]


def test_rows_are_independent_on_this_device_with_a_real_vocabulary(device: torch.device) -> None:
    """An odd vocabulary: rows differ in alignment, so a kernel may split them differently. The
    draw must not notice; reported log-probabilities may differ in their last bits."""
    vocab_size, rows = 32_001, 9
    logits = (random_logits(rows, vocab_size) * 2).to(device)
    options: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"top_k": 40, "min_p": 0.01}]
    sequences = [
        make_sequence([1], seed=index, temperature=1.3, num_logprobs=5, **options[index % 3])
        for index in range(rows)
    ]
    sampler = make_sampler(vocab_size, device)
    together = sampler.sample(logits, sequences)
    for index, sequence in enumerate(sequences):
        (alone,) = sampler.sample(logits[index : index + 1], [sequence])
        expected = together[index]
        assert alone.token_id == expected.token_id
        assert alone.logprobs is not None
        assert expected.logprobs is not None
        assert alone.logprobs.logprob == pytest.approx(expected.logprobs.logprob, abs=1e-5)
        assert [i for i, _ in alone.logprobs.top] == [i for i, _ in expected.logprobs.top]


def test_a_batch_that_changes_from_step_to_step_gives_each_its_own() -> None:
    sampler = make_sampler()
    params: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"top_p": 0.8},
        {"presence_penalty": 2.0, "temperature": 0.0},
        {"top_k": 4, "logit_bias": ((4, 3.0),)},
        {"min_tokens": 4},
    ]
    sequences = [make_sequence([1, 2], seed=i, max_tokens=50, **p) for i, p in enumerate(params)]
    for step, places in enumerate([[0, 1, 2, 3, 4], [4, 3, 1], [1, 2], [1, 2], [0, 4, 2, 1, 3]]):
        logits = random_logits(len(places), seed=step)
        batch = [sequences[place] for place in places]
        tokens = sampler.sample(logits, batch)
        for row, sequence, token in zip(logits, batch, tokens, strict=True):
            assert token.token_id == reference(row, sequence)
            sequence.append_token(token.token_id)
