"""Tokens from logits: right by a plain reference, and independent of the batch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import InternalError
from engine.randomness import uniforms
from engine.sampler import SampledToken, Sampler
from engine.sampling_plan import MAX_CANDIDATES
from tests.sequences import make_sequence

if TYPE_CHECKING:
    from engine.sequence import Sequence

VOCAB = 50
EOS = 3
CPU = torch.device("cpu")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def make_sampler(vocab_size: int = VOCAB, device: torch.device = CPU) -> Sampler:
    return Sampler(vocab_size, device, eos_token_ids=[EOS])


def random_logits(rows: int, vocab_size: int = VOCAB, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab_size, generator=generator) * 3


def sample_one(logits: torch.Tensor, sequence: Sequence) -> SampledToken:
    return make_sampler(logits.shape[-1]).sample(logits.reshape(1, -1), [sequence])[0]


def token_of(logits: torch.Tensor, sequence: Sequence) -> int:
    return sample_one(logits, sequence).token_id


def reference(logits: torch.Tensor, sequence: Sequence, eos: int = EOS) -> int:
    """One row, written down plainly: Python floats, sorted lists, exact sums."""
    sampling = sequence.sampling
    row = logits.float().tolist()
    output = sequence.output_token_ids
    for token_id in set(sequence.token_ids):
        penalty = sampling.repetition_penalty
        row[token_id] = row[token_id] / penalty if row[token_id] > 0 else row[token_id] * penalty
    for token_id in set(output):
        row[token_id] -= sampling.frequency_penalty * output.count(token_id)
        row[token_id] -= sampling.presence_penalty
    for token_id, bias in dict(sampling.logit_bias).items():
        row[token_id] += bias
    if len(output) < sampling.min_tokens:
        for token_id in {*sampling.stop_token_ids, *(() if sampling.ignore_eos else (eos,))}:
            row[token_id] = -math.inf
    best = max(row)
    if sampling.is_greedy:
        return row.index(best)
    weights = [math.exp((logit - best) / sampling.temperature) for logit in row]
    weights = [weight if weight >= sampling.min_p else 0.0 for weight in weights]
    line = sorted(range(len(row)), key=lambda token_id: (-weights[token_id], token_id))
    if sampling.top_k == 0 and sampling.top_p == 1.0:
        line = list(range(len(row)))
    line = line[: sampling.top_k or len(line)]
    total, kept, mass = math.fsum(weights[token_id] for token_id in line), [], 0.0
    for token_id in line:
        kept.append(token_id)
        mass += weights[token_id]
        if mass >= sampling.top_p * total * (1 - 1e-9):
            break
    point = draw_point(sequence) * mass
    for token_id in kept:
        point -= weights[token_id]
        if point < 0:
            return token_id
    return kept[-1]


def draw_point(sequence: Sequence) -> float:
    seeds = np.array([sequence.sampling.seed], np.uint64)
    return float(uniforms(seeds, np.array([sequence.num_tokens], np.uint64))[0])


# ---- against the reference --------------------------------------------------------------

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
    """An odd vocabulary: rows differ in alignment, so a kernel may split them differently."""
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
        assert sampler.sample(logits[index : index + 1], [sequence]) == [together[index]]


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


# ---- batches that change ----------------------------------------------------------------


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
