"""Thoughts in OpenAI's Responses: items of their own, out and in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import openai
import pytest

from tests.gateway.running_gateway import RunningGateway, client_to, gateway_of
from tests.gateway.test_dialects import events_of
from tests.gateway.test_http_edge import MODEL, error_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx

# The node echoes the prompt, so that a user can write what the model is to say.
TEMPLATE = (
    "{# </think> <tool_call> #}{% if tools %}{% endif %}{% for message in messages %}"
    "{% if message.reasoning_content %}({{ message.reasoning_content }}){% endif %}"
    "{{ message.content }}"
    "{% for call in message.tool_calls or [] %}[{{ call.function.name }}]{% endfor %}"
    "<|end|>{% endfor %}"
)
SAID = "<think>hm, so</think>Hello"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    with gateway_of(TEMPLATE, tmp_path_factory.mktemp("thinking")) as running:
        yield running


@pytest.fixture(scope="module")
def http(running: RunningGateway) -> Iterator[httpx.Client]:
    with client_to(running) as client:
        yield client


def test_thoughts_are_an_item_before_the_message(running: RunningGateway) -> None:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0) as client:
        answer = client.responses.create(model=MODEL, input=SAID)
    thought, message = answer.output
    assert (thought.type, message.type) == ("reasoning", "message")
    assert isinstance(thought, openai.types.responses.ResponseReasoningItem)
    assert thought.content
    assert (thought.content[0].text, thought.summary, thought.status) == ("hm, so", [], "completed")
    assert answer.output_text == "Hello"
    assert answer.usage
    assert answer.usage.output_tokens_details.reasoning_tokens > 0


def test_streamed_thoughts_are_closed_before_the_message_opens(http: httpx.Client) -> None:
    events = events_of(http, "/v1/responses", {"input": SAID})
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    end = kinds.index("output_item.done")
    assert kinds[2:4] == ["output_item.added", "content_part.added"]
    assert set(kinds[4 : end - 2]) == {"reasoning_text.delta"}
    assert kinds[end - 2 : end] == ["reasoning_text.done", "content_part.done"]
    assert kinds[end + 1 : end + 3] == ["output_item.added", "content_part.added"]
    deltas = [event["delta"] for event in events if event["type"].endswith("reasoning_text.delta")]
    assert "".join(deltas) == events[end - 2]["text"] == "hm, so"
    of_item = [event for event in events[2 : end + 1] if "item_id" in event]
    assert {event["item_id"] for event in of_item} == {events[end]["item"]["id"]}
    assert {event["output_index"] for event in events[2 : end + 1]} == {0}
    assert events[-1]["response"]["output"][0] == events[end]["item"]


def test_only_what_was_open_at_the_end_is_incomplete(http: httpx.Client) -> None:
    cut = http.post("/v1/responses", json={"input": SAID, "max_output_tokens": 12}).json()
    assert [item["status"] for item in cut["output"]] == ["incomplete"]
    tokens = http.post("/tokenize", json={"prompt": SAID, "add_special_tokens": False}).json()
    most = tokens["count"]
    cut = http.post("/v1/responses", json={"input": SAID, "max_output_tokens": most}).json()
    assert [item["status"] for item in cut["output"]] == ["completed", "incomplete"]


def test_thoughts_come_back_with_what_was_said_after_them(http: httpx.Client) -> None:
    def thought(text: str) -> dict[str, Any]:
        content = [{"type": "reasoning_text", "text": text}]
        return {"type": "reasoning", "id": "rs_1", "summary": [], "content": content}

    def call(name: str) -> dict[str, Any]:
        return {"type": "function_call", "call_id": name, "name": name, "arguments": "{}"}

    talk = [
        thought("a"),
        {"role": "assistant", "content": "one"},
        call("f"),
        thought("b"),
        call("g"),
        call("h"),
        {"type": "reasoning", "id": "rs_2", "summary": [], "encrypted_content": "x"},
        {"role": "user", "content": "two"},
    ]
    asked = {"input": talk, "include": ["reasoning.encrypted_content"], "store": False}
    answer = http.post("/v1/responses", json=asked)
    assert answer.status_code == 200, answer.text
    assert answer.json()["output"][0]["content"][0]["text"] == "(a)one[f](b)[g][h]two"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"input": [{"type": "reasoning", "content": 5}]}, "input[0].content"),
        ({"input": [{"type": "reasoning"}]}, "input"),
    ],
)
def test_what_cannot_be_asked_of_thoughts_is_named(
    http: httpx.Client, changes: dict[str, Any], param: str
) -> None:
    refused = http.post("/v1/responses", json={"input": "x", **changes})
    assert (refused.status_code, error_of(refused)["param"]) == (400, param)
