"""Tokens from logits: right by a plain reference, and independent of the batch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from cluster.errors import InternalError
from kernels.sample import MAX_CANDIDATES
from tests.engine.sampler_reference import EOS, VOCAB, make_sampler, random_logits, reference
from tests.sequences import make_sequence

if TYPE_CHECKING:
    from engine.sampler import SampledToken
    from engine.sequence import Sequence


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def sample_one(logits: torch.Tensor, sequence: Sequence) -> SampledToken:
    return make_sampler(logits.shape[-1]).sample(logits.reshape(1, -1), [sequence])[0]


def token_of(logits: torch.Tensor, sequence: Sequence) -> int:
    return sample_one(logits, sequence).token_id


# ---- greedy -----------------------------------------------------------------------------


def test_temperature_zero_takes_the_best_token(device: torch.device) -> None:
    logits = random_logits(3).to(device)
    sequences = [make_sequence([1], temperature=0.0) for _ in range(3)]
    tokens = make_sampler(device=device).sample(logits, sequences)
    assert [token.token_id for token in tokens] == logits.argmax(dim=-1).tolist()


def test_of_equal_tokens_the_first_is_best() -> None:
    assert token_of(torch.tensor([0.0, 2.0, 2.0, 1.0]), make_sequence([1], temperature=0.0)) == 1
    biased = make_sequence([1], temperature=0.0, logit_bias=((2, 2.0), (1, 2.0)))
    assert token_of(torch.zeros(4), biased) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_of_any_float_type_are_taken_and_left_alone(dtype: torch.dtype) -> None:
    logits = random_logits(2).to(dtype)
    before = logits.clone()
    sequences = [
        make_sequence(
            [1], output=[2], repetition_penalty=1.5, min_tokens=3, logit_bias=((1, 9.0),)
        ),
        make_sequence([1], temperature=0.0),
    ]
    make_sampler().sample(logits, sequences)
    assert torch.equal(logits, before)


def test_an_empty_batch_has_no_tokens() -> None:
    assert make_sampler().sample(torch.empty(0, VOCAB), []) == []


# ---- draws ------------------------------------------------------------------------------


def test_tokens_come_with_their_probability() -> None:
    logits = torch.tensor([0.0, math.log(2.0), math.log(5.0), math.log(12.0)])
    size = 4000
    sequences = [make_sequence([1], seed=seed) for seed in range(size)]
    tokens = make_sampler(4).sample(logits.expand(size, 4), sequences)
    counts = np.bincount([token.token_id for token in tokens], minlength=4) / size
    assert np.abs(counts - np.array([1, 2, 5, 12]) / 20).max() < 0.03


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.55}, {0, 1}),
        ({"min_p": 0.4}, {0, 1}),
        ({"min_p": 0.6}, {0}),
        ({"top_k": 3, "top_p": 0.9}, {0, 1, 2}),
        ({"top_k": 2, "top_p": 0.7}, {0, 1}),  # 0.5 / 0.75 of what top_k left is not enough
        ({"top_k": 2, "top_p": 0.6}, {0}),
        ({"temperature": 0.01}, {0}),
    ],
)
def test_filters_keep_what_they_should(sampling: dict[str, Any], allowed: set[int]) -> None:
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    sequences = [make_sequence([1], seed=seed, **sampling) for seed in range(200)]
    tokens = make_sampler(4).sample(logits.expand(200, 4), sequences)
    assert {token.token_id for token in tokens} == allowed


def test_of_equal_tokens_a_filter_keeps_the_first() -> None:
    sequences = [make_sequence([1], seed=seed, top_k=2) for seed in range(64)]
    tokens = make_sampler(8).sample(torch.zeros(64, 8), sequences)
    assert {token.token_id for token in tokens} == {0, 1}


@pytest.mark.parametrize(
    "sampling",
    [{"top_p": 0.95}, {"top_k": 3000}, {"top_k": 3000, "top_p": 0.95}, {"top_k": 5000}],
)
def test_a_nucleus_larger_than_expected_is_drawn_from_whole(sampling: dict[str, Any]) -> None:
    vocab_size = 4 * MAX_CANDIDATES
    logits = random_logits(8, vocab_size) * 0.1
    assert logits.softmax(-1).sort(descending=True).values[:, :MAX_CANDIDATES].sum(-1).max() < 0.9
    sequences = [make_sequence([1], seed=seed, num_logprobs=0, **sampling) for seed in range(8)]
    tokens = make_sampler(vocab_size).sample(logits, sequences)
    expected = [reference(row, seq) for row, seq in zip(logits, sequences, strict=True)]
    assert [token.token_id for token in tokens] == expected
    for row, token in zip(logits.log_softmax(-1), tokens, strict=True):
        assert token.logprobs is not None
        assert token.logprobs.logprob == pytest.approx(float(row[token.token_id]), abs=1e-5)


def test_a_tiny_temperature_is_greedy_and_not_an_error() -> None:
    for temperature in (1e-3, 1e-30, 1e-50):
        sequence = make_sequence([1], temperature=temperature)
        logits = random_logits(1)
        assert token_of(logits, sequence) == int(logits.argmax())


# ---- seeds ------------------------------------------------------------------------------


def test_a_sequence_computed_again_draws_the_same_tokens() -> None:
    """After preemption, a retry or a migration: the position is what counts."""

    def continue_from(output: list[int], steps: int) -> list[int]:
        sequence = make_sequence([1, 2, 3], output=output, seed=99)
        for _ in range(steps):
            row = random_logits(1, seed=sequence.num_tokens)
            sequence.append_token(token_of(row, sequence))
        return sequence.output_token_ids

    whole = continue_from([], 12)
    assert continue_from(whole[:1], 11) == whole
    assert continue_from(whole[:7], 5) == whole


def test_seeds_and_positions_change_the_draw() -> None:
    logits = torch.zeros(1000)
    by_seed = {token_of(logits, make_sequence([1], seed=seed)) for seed in range(20)}
    by_position = {token_of(logits, make_sequence([1] * n, seed=7)) for n in range(1, 21)}
    assert len(by_seed) > 15
    assert len(by_position) > 15


# ---- what changes logits ----------------------------------------------------------------


def test_penalties_follow_the_output_as_it_grows() -> None:
    sampler = make_sampler()
    sequence = make_sequence([1, 2], temperature=0.0, frequency_penalty=1.0, max_tokens=100)
    logits = torch.zeros(1, VOCAB)
    logits[0, 10], logits[0, 20] = 2.5, 2.0
    tokens = []
    for _ in range(5):
        token_id = sampler.sample(logits, [sequence])[0].token_id
        sequence.append_token(token_id)
        tokens.append(token_id)
    assert tokens == [10, 20, 10, 20, 10]


def test_repetition_counts_the_prompt_and_the_others_do_not() -> None:
    logits = torch.zeros(VOCAB)
    logits[10], logits[20] = 2.0, 1.5
    cases: list[tuple[dict[str, Any], int]] = [
        ({"repetition_penalty": 2.0}, 20),
        ({"presence_penalty": 2.0}, 10),
        ({"frequency_penalty": 2.0}, 10),
    ]
    for penalty, expected in cases:
        assert token_of(logits, make_sequence([10], temperature=0.0, **penalty)) == expected


def test_repetition_makes_an_unlikely_token_less_likely_still() -> None:
    logits = torch.full((VOCAB,), -9.0)
    logits[10], logits[20] = -2.0, -3.0
    assert token_of(logits, make_sequence([10], temperature=0.0)) == 10
    assert token_of(logits, make_sequence([10], temperature=0.0, repetition_penalty=2.0)) == 20


def test_many_distinct_tokens_are_counted() -> None:
    output = list(range(VOCAB)) * 3
    sequence = make_sequence([1], output=output[:-1], temperature=0.0, presence_penalty=1.0)
    sampler = make_sampler(200)
    logits = torch.zeros(1, 200)
    logits[0, 5] = 0.5
    for token_id in range(60, 199):
        sampler.sample(logits, [sequence])
        sequence.append_token(token_id)
    assert sampler.sample(logits, [sequence])[0].token_id == 50


def test_end_tokens_are_banned_until_there_are_min_tokens() -> None:
    sampler = make_sampler()
    logits = torch.zeros(1, VOCAB)
    logits[0, EOS], logits[0, 7], logits[0, 30] = 9.0, 8.0, 1.0
    sequence = make_sequence(
        [1], temperature=0.0, min_tokens=2, max_tokens=9, stop_token_ids=(7, 9_999)
    )
    for expected in (30, 30, EOS):
        token_id = sampler.sample(logits, [sequence])[0].token_id
        assert token_id == expected
        sequence.append_token(token_id)


def test_the_last_of_two_biases_of_a_token_wins_and_unknown_ids_do_no_harm() -> None:
    sequence = make_sequence(
        [1], temperature=0.0, logit_bias=((5, 50.0), (5, -50.0), (6, 1.0), (9_999, 100.0))
    )
    assert token_of(torch.zeros(VOCAB), sequence) == 6


def test_biases_and_bans_are_gone_through_once_for_a_sequence(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for each batch: many rows with a thousand each would hold up all that come and go."""
    sampler = make_sampler(device=device)
    logits = torch.zeros(2, VOCAB, device=device)
    biased = make_sequence([1], temperature=0.0, logit_bias=((6, 1.0), (8, 2.0)))
    banned = make_sequence([1], temperature=0.0, min_tokens=2, stop_token_ids=(0, 1))
    before = [token.token_id for token in sampler.sample(logits, [biased, banned])]
    monkeypatch.delattr("engine.penalties.TokenValues.of")
    after = [token.token_id for token in sampler.sample(logits, [banned, biased])]
    assert (before, after) == ([8, 2], [2, 8])


# ---- log-probabilities ------------------------------------------------------------------


def test_logprobs_are_those_of_the_unchanged_distribution() -> None:
    logits = random_logits(1)
    sequence = make_sequence(
        [1], temperature=0.5, top_k=3, num_logprobs=4, logit_bias=((1, 50.0), (2, 50.0))
    )
    token = sample_one(logits, sequence)
    expected = logits[0].log_softmax(-1)
    assert token.token_id in (1, 2)
    assert token.logprobs is not None
    assert token.logprobs.logprob == pytest.approx(float(expected[token.token_id]), abs=1e-5)
    top = expected.topk(4)
    assert [token_id for token_id, _ in token.logprobs.top] == top.indices.tolist()
    assert [logprob for _, logprob in token.logprobs.top] == pytest.approx(
        top.values.tolist(), abs=1e-5
    )


def test_each_row_has_as_many_logprobs_as_it_asked_for() -> None:
    wanted = [None, 0, 5, 20, 2]
    sequences = [make_sequence([1], temperature=0.0, num_logprobs=count) for count in wanted]
    tokens = make_sampler().sample(random_logits(5), sequences)
    assert [None if t.logprobs is None else len(t.logprobs.top) for t in tokens] == wanted


# ---- bad logits -------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {}, {"top_p": 0.9, "num_logprobs": 2}])
def test_a_bad_row_ends_only_its_own_sequence(
    bad: float, sampling: dict[str, Any], device: torch.device
) -> None:
    logits = random_logits(3).to(device)
    sequences = [make_sequence([1], seed=seed, **sampling) for seed in range(3)]
    sampler = make_sampler(device=device)
    expected = sampler.sample(logits, sequences)
    logits[1, :] = bad
    tokens = sampler.sample(logits, sequences)
    assert tokens[0] == expected[0]
    assert tokens[2] == expected[2]
    assert isinstance(tokens[1].error, InternalError)
    assert tokens[1].token_id == -1
    assert tokens[1].logprobs is None


def test_one_bad_logit_is_enough() -> None:
    logits = random_logits(1)
    logits[0, 33] = math.nan
    assert sample_one(logits, make_sequence([1], temperature=0.0)).error is not None
    assert sample_one(logits, make_sequence([1], top_k=5)).error is not None


def test_masked_tokens_are_never_drawn_and_no_error() -> None:
    logits = random_logits(1).repeat(64, 1)
    logits[:, 2:] = -math.inf
    sequences = [make_sequence([1], seed=seed, top_p=0.99) for seed in range(64)]
    tokens = make_sampler().sample(logits, sequences)
    assert {token.token_id for token in tokens} == {0, 1}
    assert all(token.error is None for token in tokens)
