"""Thoughts in Anthropic's Messages, and what else Claude Code asks with every message."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from gateway.dialects.claude_code import for_models
from tests.gateway.running_gateway import client_of
from tests.gateway.test_dialects import events_of
from tests.gateway.test_http_edge import MODEL

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx

Json = dict[str, Any]
# The node echoes the prompt, so that a user can write what the model is to say.
TEMPLATE = (
    "{# </think> #}{% for message in messages %}"
    "{% if message.reasoning_content %}({{ message.reasoning_content }}){% endif %}"
    "{{ message.content }}<|end|>{% endfor %}"
    "{% if enable_thinking is false %}!{% endif %}{{ reasoning_effort }}"
)
SAID = "<think>\nhm, so\n</think>\n\nHello"
ADAPTIVE = {"type": "adaptive"}


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with client_of(TEMPLATE, tmp_path_factory.mktemp("thinking")) as client:
        yield client


def asking(**changes: Any) -> Json:
    talk = [{"role": "user", "content": SAID}]
    return {"model": MODEL, "max_tokens": 200, "messages": talk, **changes}


def said_to(http: httpx.Client, **changes: Any) -> str:
    """The words of an answer."""
    answer = http.post("/v1/messages", json=asking(**changes))
    assert answer.status_code == 200, answer.text
    return "".join(block.get("text", "") for block in answer.json()["content"])


@pytest.mark.parametrize(
    "thinking", [ADAPTIVE, {"type": "between_tools"}, {"type": "adaptive", "display": "summarized"}]
)
def test_thoughts_are_a_block_before_the_answer(http: httpx.Client, thinking: Json) -> None:
    answer = http.post("/v1/messages", json=asking(thinking=thinking)).json()
    thought, text = answer["content"]
    assert (thought["type"], thought["thinking"]) == ("thinking", "\nhm, so\n")
    assert thought["signature"]
    assert text == {"type": "text", "text": "Hello"}
    counts = answer["usage"]
    assert 0 < counts["output_tokens_details"]["thinking_tokens"] < counts["output_tokens"]


@pytest.mark.parametrize(
    "changes",
    [{}, {"thinking": {"type": "disabled"}}, {"thinking": {**ADAPTIVE, "display": "omitted"}}],
)
def test_thoughts_that_nobody_wants_are_left_out(http: httpx.Client, changes: Json) -> None:
    answer = http.post("/v1/messages", json=asking(**changes)).json()
    assert [block["type"] for block in answer["content"]] == ["text"]


def test_streamed_thoughts_are_signed_before_the_answer_opens(http: httpx.Client) -> None:
    events = events_of(http, "/v1/messages", asking(thinking=ADAPTIVE))
    blocks = [event for event in events if event["type"].startswith("content_block")]
    thoughts, words = ([b for b in blocks if b["index"] == index] for index in (0, 1))
    assert thoughts + words == blocks
    opened = {"type": "thinking", "thinking": "", "signature": ""}
    assert thoughts[0]["content_block"] == opened
    deltas = [event["delta"] for event in thoughts[1:-1]]
    assert "".join(delta["thinking"] for delta in deltas[:-1]) == "\nhm, so\n"
    assert {delta["type"] for delta in deltas[:-1]} == {"thinking_delta"}
    assert deltas[-1]["type"] == "signature_delta"
    assert deltas[-1]["signature"]
    assert thoughts[-1]["type"] == words[-1]["type"] == "content_block_stop"
    assert "".join(event["delta"]["text"] for event in words[1:-1]) == "Hello"


def test_an_answer_that_is_cut_in_its_thoughts_has_these_alone(http: httpx.Client) -> None:
    asked = asking(thinking=ADAPTIVE, max_tokens=12)
    (block,) = http.post("/v1/messages", json=asked).json()["content"]
    assert block["type"] == "thinking"
    events = events_of(http, "/v1/messages", asked)
    opened = [event["content_block"]["type"] for event in events if "content_block" in event]
    assert opened == ["thinking"]


def test_a_template_hears_whether_thoughts_are_wanted_and_how_many(http: httpx.Client) -> None:
    assert said_to(http).endswith("Hello!")
    assert said_to(http, thinking={"type": "disabled"}).endswith("Hello!")
    assert said_to(http, thinking=ADAPTIVE, output_config={"effort": "low"}).endswith("Hellolow")
    chat = {"messages": asking()["messages"], "reasoning_effort": "none"}
    answer = http.post("/v1/chat/completions", json=chat).json()
    assert answer["choices"][0]["message"]["content"].endswith("Hello!none")


def test_what_was_thought_before_a_call_goes_back_to_the_template(http: httpx.Client) -> None:
    thought = {"type": "thinking", "thinking": "hm", "signature": "x"}
    hidden = {"type": "redacted_thinking", "data": "x"}
    words = [thought, hidden, {"type": "text", "text": "one"}]
    talk = [{"role": "assistant", "content": words}, {"role": "user", "content": "two"}]
    assert said_to(http, messages=talk, thinking=ADAPTIVE) == "(hm)onetwo"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 1023}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "hard"}}, "thinking.type"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format"),
        (
            {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}},
            "context_management",
        ),
    ],
)
def test_what_a_message_cannot_ask_of_thoughts_is_said(
    http: httpx.Client, changes: Json, named: str
) -> None:
    refused = http.post("/v1/messages", json=asking(**changes))
    assert refused.status_code == 400
    assert named in refused.json()["error"]["message"]


def test_a_budget_of_thoughts_is_held_against_the_clients_max_tokens(http: httpx.Client) -> None:
    """Which is more than the context of this model, of which the client hears first here."""
    thinking = {"type": "enabled", "budget_tokens": 1024}
    refused = http.post("/v1/messages", json=asking(thinking=thinking, max_tokens=1025))
    assert "exceed context limit" in refused.json()["error"]["message"]


def test_a_message_is_taken_as_claude_code_asks_it(http: httpx.Client) -> None:
    """Turn by turn with another line to its maker, behind which prompts must begin alike."""
    counts = set()
    for billing, left in (("cc_version=2.1; cch=1a2b3;", 9), ("cc_version=2.1; cch=99;", 123456)):
        countdown = f"<total_tokens>{left} tokens left</total_tokens>"
        one = {"type": "text", "text": f"one\n{countdown}", "cache_control": {"type": "ephemeral"}}
        system = [{"type": "text", "text": f"x-anthropic-billing-header: {billing}"}, one]
        body = asking(
            system=system,
            thinking=ADAPTIVE,
            context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
            metadata={"user_id": "u"},
        )
        body["messages"] = [
            {"role": "user", "content": "two"},
            {"role": "system", "content": countdown},
            {"role": "user", "content": [{"type": "text", "text": f"three {countdown[:14]}"}]},
        ]
        answer = http.post("/v1/messages?beta=true", json=body).json()
        assert answer["content"] == [{"type": "text", "text": "onetwothree <total_tokens>"}]
        del body["max_tokens"]
        counts.add(http.post("/v1/messages/count_tokens", json=body).json()["input_tokens"])
    assert len(counts) == 1


def test_a_million_blanks_are_looked_through_once() -> None:
    """From each of them again it takes hours, in which no other stream goes on."""
    blanks = " " * 1_000_000
    countdown = "<total_tokens>9 tokens left</total_tokens>"
    assert for_models(f"one{blanks}two{blanks}{countdown}") == f"one{blanks}two"


@pytest.mark.parametrize(
    "system",
    [
        "",
        [],
        [{"type": "text", "text": "x-anthropic-billing-header: 1"}],
        "<total_tokens>1 tokens left</total_tokens>",
    ],
)
def test_a_system_that_says_nothing_is_none(http: httpx.Client, system: object) -> None:
    asked = {"messages": [{"role": "user", "content": "two"}]}
    plain = http.post("/v1/messages/count_tokens", json=asked).json()
    assert http.post("/v1/messages/count_tokens", json={**asked, "system": system}).json() == plain
    alone = {"messages": [{"role": "system", "content": system}]}
    assert http.post("/v1/messages/count_tokens", json=alone).status_code == 400


def test_an_overflow_reads_as_claude_code_expects(http: httpx.Client) -> None:
    wide = http.post("/v1/messages", json=asking(max_tokens=5000)).json()["error"]["message"]
    num_prompt = http.post("/v1/messages/count_tokens", json=asking()).json()["input_tokens"]
    assert wide == (
        f"input length and `max_tokens` exceed context limit: {num_prompt} + 5000 > 512, decrease "
        "input length or `max_tokens` and try again"
    )
    talk = [{"role": "user", "content": "word " * 3000}]
    long = http.post("/v1/messages", json=asking(messages=talk)).json()["error"]["message"]
    assert long.startswith("prompt is too long: ")
    assert long.endswith(" tokens > 511 maximum")
