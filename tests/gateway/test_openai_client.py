"""The unmodified `openai` client against the gateway: what applications do keeps working."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import openai
import pytest

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam

    from tests.gateway.running_gateway import RunningGateway

MODEL = "org/test-model"
ASK: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hello, how are you?"}]


def text_of(chunks: list[ChatCompletionChunk]) -> str:
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def chat_chunks(client: openai.OpenAI, **options: Any) -> list[ChatCompletionChunk]:
    return list(client.chat.completions.create(model=MODEL, messages=ASK, stream=True, **options))


def test_a_chat_answers_with_text_and_usage(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=ASK)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == MODEL
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == "Hello, how are you?"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == answer.usage.prompt_tokens + 1  # and the end token
    assert answer.usage.total_tokens == 2 * answer.usage.prompt_tokens + 1
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == answer.usage.prompt_tokens - 1


def test_a_streamed_chat_says_the_same(client: openai.OpenAI) -> None:
    chunks = chat_chunks(client)
    assert text_of(chunks) == "Hello, how are you?"
    assert len({(c.id, c.created, c.model, c.object) for c in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(c.choices[0].delta.role is None for c in chunks[1:])
    reasons = [c.choices[0].finish_reason for c in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]


def test_usage_comes_in_a_last_chunk_when_asked_for(client: openai.OpenAI) -> None:
    chunks = chat_chunks(client, stream_options={"include_usage": True})
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == chunks[-1].usage.prompt_tokens + 1
    assert all(c.usage is None for c in chunks[:-1])


def test_usage_grows_with_each_chunk_when_asked_for(client: openai.OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = chat_chunks(client, stream_options=options)
    counts = [c.usage.completion_tokens for c in chunks if c.usage]
    assert len(counts) == len(chunks)
    assert counts == sorted(counts)


def test_choices_are_numbered_and_each_is_whole(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=ASK, n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.message.content for choice in answer.choices} == {"Hello, how are you?"}
    texts = {0: "", 1: "", 2: ""}
    finished = []
    for chunk in chat_chunks(client, n=3):
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            finished.append(choice.index)
    assert set(texts.values()) == {"Hello, how are you?"}
    assert sorted(finished) == [0, 1, 2]


def test_max_tokens_ends_an_answer_with_length(client: openai.OpenAI) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = client.chat.completions.create(
            model=MODEL,
            messages=ASK,
            **{name: 2},  # type: ignore[call-overload]
        )
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 2


def test_a_first_token_that_ends_the_answer_needs_no_decode_node(
    client: openai.OpenAI, gateway: RunningGateway
) -> None:
    before = len(gateway.decode.submitted)
    answer = client.completions.create(model=MODEL, prompt="one two", max_tokens=1)
    assert answer.choices[0].finish_reason == "length"
    assert len(gateway.decode.submitted) == before


def test_a_stop_string_ends_the_text_and_the_work(
    client: openai.OpenAI, gateway: RunningGateway
) -> None:
    answer = client.completions.create(
        model=MODEL,
        prompt="one two three four five six",
        max_tokens=400,
        stop=[" four"],
        extra_body={"ignore_eos": True},
    )
    assert answer.choices[0].text == "one two three"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens < 20
    gateway.until(lambda: gateway.decode.is_idle)


def test_a_stop_string_can_be_shown(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL,
        prompt="one two three four five six",
        max_tokens=400,
        stop=" four",
        extra_body={"include_stop_str_in_output": True},
    )
    assert answer.choices[0].text == "one two three four"


def test_a_stop_string_does_not_count_before_min_tokens(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL,
        prompt="one two three one two three",
        max_tokens=400,
        stop=" two",
        extra_body={"min_tokens": 5},
    )
    assert answer.choices[0].text == "one two three one"


def test_special_tokens_are_shown_when_asked_for(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=ASK, extra_body={"skip_special_tokens": False}
    )
    content = answer.choices[0].message.content
    assert content == "<bos><|user|>Hello, how are you?<|end|><|assistant|>"


def test_chat_logprobs_name_every_token(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=ASK, logprobs=True, top_logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert answer.usage is not None
    assert len(logprobs.content) == answer.usage.completion_tokens
    assert all(len(entry.top_logprobs) == 2 for entry in logprobs.content)
    assert all(entry.bytes == list(entry.token.encode()) for entry in logprobs.content)
    streamed: list[Any] = []
    for chunk in chat_chunks(client, logprobs=True, top_logprobs=2):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content or []
    assert streamed == logprobs.content


def test_completion_logprobs_have_offsets(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="one two", max_tokens=9, logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.text_offset is not None
    offsets = [sum(map(len, logprobs.tokens[:i])) for i in range(len(logprobs.tokens))]
    assert logprobs.text_offset == offsets
    streamed = client.completions.create(
        model=MODEL, prompt="one two", max_tokens=9, logprobs=1, stream=True
    )
    tokens: list[str] = []
    for chunk in streamed:
        if chunk.choices[0].logprobs and chunk.choices[0].logprobs.tokens:
            assert (
                chunk.choices[0].logprobs.text_offset
                == offsets[len(tokens) :][: len(chunk.choices[0].logprobs.tokens)]
            )
            tokens += chunk.choices[0].logprobs.tokens
    assert tokens == logprobs.tokens


def test_a_completion_takes_text_ids_and_lists_of_both(client: openai.OpenAI) -> None:
    ids = [40, 41, 42]
    prompts: list[tuple[Any, int]] = [
        ("one two", 1),
        (["one two", "three"], 2),
        (ids, 1),
        ([ids, ids], 2),
    ]
    for prompt, num_choices in prompts:
        answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=50)
        assert answer.object == "text_completion"
        assert [c.index for c in answer.choices] == list(range(num_choices))
    several = client.completions.create(model=MODEL, prompt=["one two", "three"], max_tokens=50)
    assert [c.text for c in several.choices] == ["one two", "three"]


def test_a_streamed_completion_ends_in_its_last_text_chunk(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(model=MODEL, prompt="one two three", max_tokens=3, stream=True)
    )
    assert [c.choices[0].finish_reason for c in chunks][-1] == "length"
    assert all(c.object == "text_completion" for c in chunks)
    assert chunks[-1].choices[0].text


def test_echo_repeats_the_prompt_before_the_text(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt="one two", max_tokens=50, echo=True)
    assert whole.choices[0].text == "one twoone two"
    chunks = client.completions.create(
        model=MODEL, prompt="one two", max_tokens=50, echo=True, stream=True
    )
    assert "".join(c.choices[0].text for c in chunks) == "one twoone two"


def test_a_seed_reaches_the_nodes_and_differs_between_choices(
    client: openai.OpenAI, gateway: RunningGateway
) -> None:
    gateway.prefill.submitted.clear()
    client.completions.create(model=MODEL, prompt=["one", "two"], n=2, seed=7, max_tokens=2)
    seeds = [s.sampling.seed for s in gateway.prefill.submitted.values()]
    assert seeds[0] == seeds[2] == 7
    assert seeds[1] == seeds[3]
    assert abs(seeds[1] - 7) > 1000


def test_token_ids_are_returned_when_asked_for(client: openai.OpenAI) -> None:
    asked = {"return_token_ids": True, "ignore_eos": True}
    whole: Any = client.completions.create(
        model=MODEL, prompt=[40, 41, 42], max_tokens=3, extra_body=asked
    )
    assert whole.choices[0].token_ids == whole.choices[0].prompt_token_ids == [40, 41, 42]
    chunks: Any = client.completions.create(
        model=MODEL, prompt=[40, 41, 42], max_tokens=3, stream=True, extra_body=asked
    )
    parts = [chunk.choices[0] for chunk in chunks]
    assert [i for part in parts for i in part.token_ids] == [40, 41, 42]
    assert parts[0].prompt_token_ids == [40, 41, 42]
    assert not any(hasattr(part, "prompt_token_ids") for part in parts[1:])


def test_models_are_listed_and_retrieved_with_a_slash(client: openai.OpenAI) -> None:
    listed = client.models.list().data
    assert [model.id for model in listed] == [MODEL, "alias"]
    found = client.models.retrieve(MODEL)
    assert (found.id, found.object) == (MODEL, "model")
    assert found.max_model_len == 512  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("org/other")


def test_a_pattern_among_the_served_names_matches(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="claude-anything", prompt="one", max_tokens=5)
    assert answer.model == "claude-anything"


def test_no_name_that_a_pattern_would_match_is_longer_than_names_are(client: openai.OpenAI) -> None:
    """It would be sent back with each token."""
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="claude-" + "x" * 10_000, prompt="one", max_tokens=5)


def test_errors_have_the_clients_own_types(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nope", messages=ASK)
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=ASK, temperature=-1)
    assert (bad.value.code, bad.value.param) == ("invalid_value", "temperature")
    with pytest.raises(openai.BadRequestError) as unsupported:
        client.chat.completions.create(
            model=MODEL,
            messages=ASK,
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        )
    assert (unsupported.value.code, unsupported.value.param) == ("unsupported", "tools")


def test_an_overflow_reads_as_other_tools_expect(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "word " * 3000}], max_tokens=10
        )
    assert long.value.code == "context_length_exceeded"
    assert "This model's maximum context length is 512 tokens. However, you requested" in str(
        long.value
    )
    assert "in the messages, 10 in the completion)" in str(long.value)


def test_a_client_that_leaves_a_stream_frees_both_nodes(
    client: openai.OpenAI, gateway: RunningGateway
) -> None:
    before = gateway.gateway.measures.num_disconnected
    gateway.do(gateway.decode.gates.tokens.clear)
    try:
        stream = client.chat.completions.create(
            model=MODEL,
            messages=ASK,
            stream=True,
            max_tokens=400,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        stream.close()
        gateway.until(lambda: gateway.decode.is_idle and gateway.prefill.is_idle)
        gateway.until(lambda: not gateway.gateway.dispatcher.active)
    finally:
        gateway.do(gateway.decode.gates.tokens.set)
    gateway.until(lambda: gateway.gateway.measures.num_disconnected == before + 1)


def test_a_client_that_gives_up_waiting_frees_the_prefill_node(gateway: RunningGateway) -> None:
    gateway.do(gateway.prefill.gates.first_token.clear)
    try:
        with (
            openai.OpenAI(
                base_url=f"{gateway.url}/v1", api_key="any", max_retries=0, timeout=0.3
            ) as hasty,
            pytest.raises(openai.APITimeoutError),
        ):
            hasty.chat.completions.create(model=MODEL, messages=ASK)
        gateway.until(lambda: gateway.prefill.is_idle)
        gateway.until(lambda: not gateway.gateway.dispatcher.active)
    finally:
        gateway.do(gateway.prefill.gates.first_token.set)
    admission = gateway.gateway.admission
    assert (admission.num_sequences, admission.num_queued_tokens) == (0, 0)
