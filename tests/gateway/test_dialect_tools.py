"""Tools of Responses and Messages: calls out, results in, as their clients write and read them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.gateway.running_gateway import client_of
from tests.gateway.test_dialects import events_of
from tests.gateway.test_http_edge import MODEL
from tests.gateway.test_tools import CALL, TEMPLATE

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx

Json = dict[str, Any]
SCHEMA = {"type": "object"}


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with client_of(TEMPLATE, tmp_path_factory.mktemp("tools")) as client:
        yield client


def message_body(**changes: Any) -> Json:
    return {
        "model": MODEL,
        "max_tokens": 200,
        "messages": [{"role": "user", "content": CALL}],
        "tools": [{"name": "sum", "input_schema": SCHEMA}],
        **changes,
    }


def response_body(**changes: Any) -> Json:
    tool = {"type": "function", "name": "sum", "parameters": SCHEMA}
    return {"model": MODEL, "input": CALL, "tools": [tool], **changes}


# ---- Messages --------------------------------------------------------------------------------


def test_a_message_holds_its_call_as_a_block(http: httpx.Client) -> None:
    answer = http.post("/v1/messages", json=message_body()).json()
    text, use = answer["content"]
    assert text == {"type": "text", "text": "T"}
    assert (use["type"], use["name"], use["input"]) == ("tool_use", "sum", {"a": 1})
    assert answer["stop_reason"] == "tool_use"


def test_a_message_holds_numbers_of_any_length_as_they_were_written(http: httpx.Client) -> None:
    talk = [{"role": "user", "content": CALL.replace('"a": 1', f'"a": {2**80}')}]
    answer = http.post("/v1/messages", json=message_body(messages=talk)).json()
    assert answer["content"][-1]["input"] == {"a": 2**80}


def test_a_streamed_message_opens_and_closes_one_block_at_a_time(http: httpx.Client) -> None:
    body = message_body(messages=[{"role": "user", "content": CALL + CALL}])
    events = events_of(http, "/v1/messages", body)
    blocks = [event for event in events if event["type"].startswith("content_block")]
    assert [event["index"] for event in blocks] == sorted(event["index"] for event in blocks)
    for index, kind in enumerate(("text", "tool_use", "tool_use")):
        own = [event for event in blocks if event["index"] == index]
        assert own[0]["content_block"]["type"] == kind
        assert [event["type"] for event in own[1:]] == ["content_block_delta", "content_block_stop"]
    deltas = [event["delta"] for event in blocks if "delta" in event]
    assert [delta.get("partial_json") for delta in deltas] == [None, '{"a": 1}', '{"a": 1}']
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


def test_results_of_a_message_go_back_before_its_words(http: httpx.Client) -> None:
    use = {"type": "tool_use", "id": "call_1", "name": "sum", "input": {"a": 1}}
    result = {
        "type": "tool_result",
        "tool_use_id": "call_1",
        "content": [{"type": "text", "text": "two"}],
    }
    words = {"type": "text", "text": " and?"}
    talk = [{"role": "assistant", "content": [use]}, {"role": "user", "content": [result, words]}]
    answer = http.post("/v1/messages", json=message_body(messages=talk, tools=[])).json()
    assert answer["content"][0]["text"] == "(1)sum:two and?"


@pytest.mark.parametrize("said", [{}, {"content": None}, {"content": ""}, {"content": []}])
def test_a_result_may_say_nothing(http: httpx.Client, said: Json) -> None:
    use = {"type": "tool_use", "id": "call_1", "name": "sum", "input": {"a": 1}}
    result = {"type": "tool_result", "tool_use_id": "call_1", **said}
    talk = [{"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    answer = http.post("/v1/messages", json=message_body(messages=talk, tools=[])).json()
    assert answer["content"][0]["text"] == "(1)sum:"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [{"type": "web_search_20250305", "name": "web"}]}, "tools of the client"),
        (
            {
                "messages": [
                    {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f"}]}
                ]
            },
            "messages[0].content[0].input",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "x"}]}]},
            "messages[0].content[0].tool_use_id",
        ),
    ],
)
def test_what_a_message_cannot_ask_of_tools_is_said(
    http: httpx.Client, changes: Json, named: str
) -> None:
    refused = http.post("/v1/messages", json=message_body(**changes))
    assert refused.status_code == 400
    assert named in refused.json()["error"]["message"]


def test_one_call_is_enough_where_the_client_says_so(http: httpx.Client) -> None:
    twice = [{"role": "user", "content": CALL + CALL}]
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    message = http.post(
        "/v1/messages", json=message_body(messages=twice, tool_choice=choice)
    ).json()
    assert [block["type"] for block in message["content"]] == ["text", "tool_use"]
    body = response_body(input=CALL + CALL, parallel_tool_calls=False)
    response = http.post("/v1/responses", json=body).json()
    assert [item["type"] for item in response["output"]] == ["message", "function_call"]
    assert response["parallel_tool_calls"] is False


def test_tokens_of_tools_are_counted(http: httpx.Client) -> None:
    body = message_body()
    used = http.post("/v1/messages", json=body).json()["usage"]
    counted = http.post("/v1/messages/count_tokens", json=body).json()
    assert counted["input_tokens"] == used["input_tokens"] + used["cache_read_input_tokens"]
    tool = {"type": "function", "function": {"name": "sum"}}
    plain = {"messages": body["messages"], "add_generation_prompt": True}
    without, with_tool = (
        http.post("/tokenize", json=plain | changes).json()["count"]
        for changes in ({}, {"tools": [tool]})
    )
    assert counted["input_tokens"] == with_tool == without + 1


# ---- Responses -------------------------------------------------------------------------------


def test_a_response_holds_its_call_as_an_item(http: httpx.Client) -> None:
    answer = http.post("/v1/responses", json=response_body()).json()
    words, call = answer["output"]
    assert words["content"][0]["text"] == "T"
    assert (call["type"], call["name"], call["arguments"]) == ("function_call", "sum", '{"a": 1}')
    assert call["call_id"]
    assert answer["status"] == "completed"


def test_a_streamed_response_ends_with_the_items_that_it_streamed(http: httpx.Client) -> None:
    events = events_of(http, "/v1/responses", response_body(input=CALL + CALL))
    added = [event["item"] for event in events if event["type"] == "response.output_item.added"]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert [item["type"] for item in added] == ["message", "function_call", "function_call"]
    assert [item["id"] for item in added] == [item["id"] for item in done]
    assert events[-1]["response"]["output"] == done
    kinds = [event["type"] for event in events if "function_call_arguments" in event["type"]]
    assert (
        kinds
        == [
            "response.function_call_arguments.delta",
            "response.function_call_arguments.done",
        ]
        * 2
    )
    assert [event["sequence_number"] for event in events] == list(range(len(events)))


def test_results_of_a_response_go_back_to_the_template(http: httpx.Client) -> None:
    talk = [
        {"role": "user", "content": "x"},
        {"type": "function_call", "call_id": "1", "name": "sum", "arguments": '{"a": 1}'},
        {"type": "function_call", "call_id": "2", "name": "add", "arguments": '{"a": 2}'},
        {"type": "function_call_output", "call_id": "2", "output": "two"},
    ]
    answer = http.post("/v1/responses", json=response_body(input=talk, tools=[])).json()
    assert answer["output"][0]["content"][0]["text"] == "x(1)(2)add:two"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function"}]}, "tools[0].type"),
        (
            {"tools": [{"type": "function", "name": "f", "strict": True}]},
            "tools[0].function.strict",
        ),
    ],
)
def test_what_a_response_cannot_ask_of_tools_is_named(
    http: httpx.Client, changes: Json, param: str
) -> None:
    refused = http.post("/v1/responses", json=response_body(**changes))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
