from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from cluster.errors import ConfigError
from loadtest.config import BenchConfig
from loadtest.workload import PlainVocabulary, load_tokenizer, plan_requests

if TYPE_CHECKING:
    from pathlib import Path

MakeConfig = Callable[..., BenchConfig]


def planned_bodies(config: BenchConfig, vocabulary: Any = None) -> list[dict[str, Any]]:
    vocabulary = vocabulary or PlainVocabulary(config.random_vocab_size)
    requests, _ = plan_requests(config, "m", vocabulary)
    return [json.loads(request.body) for request in requests]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(
    bench_config: MakeConfig,
) -> None:
    vocabulary = PlainVocabulary(1000)
    first = plan_requests(bench_config(seed=3), "m", vocabulary)
    assert plan_requests(bench_config(seed=3), "m", vocabulary) == first
    assert plan_requests(bench_config(seed=4), "m", vocabulary) != first


def test_prompts_are_token_ids_of_the_asked_length_and_all_differ(
    bench_config: MakeConfig,
) -> None:
    config = bench_config(num_prompts=20, random_input_len=30, random_vocab_size=50)
    prompts = [body["prompt"] for body in planned_bodies(config)]
    assert {len(prompt) for prompt in prompts} == {30}
    assert len({tuple(prompt) for prompt in prompts}) == 20
    assert all(0 <= token_id < 50 for prompt in prompts for token_id in prompt)


def test_a_prefix_is_shared_by_all_and_comes_before_the_length(bench_config: MakeConfig) -> None:
    bodies = planned_bodies(bench_config(random_prefix_len=6, random_input_len=4))
    assert {len(body["prompt"]) for body in bodies} == {10}
    assert len({tuple(body["prompt"][:6]) for body in bodies}) == 1


def test_lengths_spread_by_the_range_ratio(bench_config: MakeConfig) -> None:
    config = bench_config(
        num_prompts=300, random_input_len=10, random_output_len=100, random_range_ratio=0.5
    )
    bodies = planned_bodies(config)
    assert {len(body["prompt"]) for body in bodies} == set(range(5, 16))
    assert all(50 <= body["max_tokens"] <= 150 for body in bodies)


def test_warm_ups_have_prompts_of_their_own(bench_config: MakeConfig) -> None:
    config = bench_config(num_prompts=4, num_warmups=2)
    requests, warmups = plan_requests(config, "m", PlainVocabulary(1000))
    assert (len(requests), len(warmups)) == (4, 2)
    assert not {r.body for r in requests} & {w.body for w in warmups}
    alone, _ = plan_requests(bench_config(num_prompts=4), "m", PlainVocabulary(1000))
    assert alone == requests  # warming up changes nothing that is measured


def test_options_reach_the_body_and_extra_fields_win(bench_config: MakeConfig) -> None:
    config = bench_config(temperature=0.0, extra_body='{"top_k": 5, "max_tokens": 9}')
    body = planned_bodies(config)[0]
    assert body["model"] == "m"
    assert body["temperature"] == 0.0
    assert body["ignore_eos"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert (body["top_k"], body["max_tokens"]) == (5, 9)
    plain = planned_bodies(bench_config(ignore_eos=False))[0]
    assert not {"ignore_eos", "temperature"} & set(plain)


def test_a_chat_without_tokenizer_is_words(bench_config: MakeConfig) -> None:
    body = planned_bodies(bench_config(backend="openai-chat"))[0]
    (message,) = body["messages"]
    assert message["role"] == "user"
    assert len(message["content"].split()) == 5
    assert body["max_completion_tokens"] == 4


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    words = {"<s>": 0, **{f"w{i}": i for i in range(1, 40)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_a_tokenizer_gives_text_of_the_asked_length_without_special_tokens(
    bench_config: MakeConfig, tokenizer_folder: Path
) -> None:
    vocabulary = load_tokenizer(str(tokenizer_folder))
    body = planned_bodies(bench_config(random_input_len=12), vocabulary)[0]
    assert vocabulary.count(body["prompt"]) == 12
    assert "<s>" not in body["prompt"]
    assert 0 not in vocabulary.allowed


def test_a_file_that_is_no_tokenizer_is_said(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read: EOF"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ConfigError, match=r"cannot be read: .*File name too long"):
        load_tokenizer("a" * 300)


def test_a_tokenizer_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--tokenizer: .* does not exist"):
        load_tokenizer(str(tmp_path))
