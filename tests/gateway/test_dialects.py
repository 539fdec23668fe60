"""OpenAI's Responses and Anthropic's Messages: what their clients read, event by event."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest

from cluster.errors import TransferFailed
from tests.gateway.test_http_edge import MODEL, error_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.gateway.running_gateway import RunningGateway

HELLO = "Hello, how are you?"
Json = dict[str, Any]


def asking(**changes: Any) -> Json:
    return {
        "model": MODEL,
        "max_tokens": 60,
        "messages": [{"role": "user", "content": HELLO}],
        **changes,
    }


def events_of(http: httpx.Client, path: str, body: Json) -> list[Json]:
    """The data of each event, whose name is its type."""
    return parsed(http.post(path, json={**body, "stream": True}).text)


def parsed(text: str) -> list[Json]:
    events = []
    for frame in text.strip().split("\n\n"):
        name, data = frame.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def events_until_kv_is_lost(running: RunningGateway, path: str, body: Json) -> list[Json]:
    """Those of a stream whose decode node fails once its first token was read."""
    running.decode.error = TransferFailed("The KV did not arrive.", reason="digest_mismatch")
    running.do(running.decode.gates.start.clear)
    with httpx.stream(
        "POST", running.url + path, json={**body, "stream": True}, timeout=20
    ) as response:
        lines = response.iter_lines()
        first = next(lines)
        running.do(running.decode.gates.start.set)
        return parsed("\n".join([first, *lines]))


# ---- Responses -------------------------------------------------------------------------------


def test_a_response_is_read_by_its_client(client: openai.OpenAI) -> None:
    answer = client.responses.create(model=MODEL, input=HELLO)
    assert (answer.status, answer.output_text) == ("completed", HELLO)
    assert answer.id.startswith("resp_")
    assert answer.usage is not None
    assert answer.usage.output_tokens == answer.usage.input_tokens + 1
    cut = client.responses.create(model=MODEL, input=HELLO, max_output_tokens=4)
    assert cut.status == "incomplete"
    assert cut.incomplete_details is not None
    assert cut.incomplete_details.reason == "max_output_tokens"


def test_instructions_and_parts_reach_the_template(client: openai.OpenAI) -> None:
    talk: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "one"}]},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "two"}],
        },
    ]
    answer = client.responses.create(model=MODEL, instructions="three", input=talk)
    assert answer.output_text == "threeonetwo"


def test_instructions_that_say_nothing_are_none(http: httpx.Client) -> None:
    counts = [
        http.post("/v1/responses", json={"input": HELLO, **said}).json()["usage"]["input_tokens"]
        for said in ({}, {"instructions": None}, {"instructions": ""})
    ]
    assert len(set(counts)) == 1


def test_a_streamed_response_closes_what_it_opens(http: httpx.Client) -> None:
    events = events_of(http, "/v1/responses", {"input": HELLO})
    kinds = [event["type"].removeprefix("response.") for event in events]
    opening = ["created", "in_progress", "output_item.added", "content_part.added"]
    closing = ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert kinds[:4] == opening
    assert kinds[-4:] == closing
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert "".join(event["delta"] for event in events[4:-4]) == HELLO
    whole = events[-1]["response"]
    assert events[-4]["text"] == whole["output"][0]["content"][0]["text"] == HELLO
    assert events[-2]["item"] == whole["output"][0]
    assert events[0]["response"]["id"] == whole["id"]
    assert whole["completed_at"] >= whole["created_at"]
    assert events[0]["response"]["completed_at"] is None


def test_whoever_asks_for_a_stored_response_is_told_that_there_is_none(
    client: openai.OpenAI,
) -> None:
    asked: list[Callable[[str], object]] = [
        client.responses.retrieve,
        client.responses.delete,
        client.responses.cancel,
        client.responses.input_items.list,
    ]
    for ask in asked:
        with pytest.raises(openai.BadRequestError, match="No response is stored") as refused:
            ask("resp_1")
        assert refused.value.code == "unsupported"


def test_a_response_repeats_what_was_asked(http: httpx.Client) -> None:
    tool = {"type": "function", "name": "f", "parameters": {"type": "object"}}
    asked = {"instructions": "one", "temperature": 0.5, "metadata": {"a": "b"}, "user": "u"}
    asked |= {"max_output_tokens": 9, "reasoning": {"effort": "low"}, "tool_choice": "none"}
    answer = http.post("/v1/responses", json={"input": HELLO, "tools": [tool], **asked}).json()
    known = {"effort": "low", "summary": None}
    assert {name: answer[name] for name in asked} == asked | {"reasoning": known}
    assert answer["tools"] == [{**tool, "description": None, "strict": None}]
    events = events_of(http, "/v1/responses", {"input": HELLO, **asked})
    assert events[0]["response"]["instructions"] == events[-1]["response"]["instructions"] == "one"


def test_a_response_says_what_holds_where_nothing_was_asked(http: httpx.Client) -> None:
    answer = http.post("/v1/responses", json={"input": HELLO}).json()
    said = {"temperature": 1.0, "top_p": 1.0, "tools": [], "tool_choice": "auto", "store": False}
    assert said.items() <= answer.items()
    assert {"instructions", "previous_response_id", "text", "metadata", "top_logprobs"} <= set(
        answer
    )


def test_a_response_that_fails_midway_says_so_last(
    new_gateway: Callable[..., RunningGateway],
) -> None:
    events = events_until_kv_is_lost(new_gateway(), "/v1/responses", {"input": HELLO})
    assert [event["type"] for event in events[-2:]] == ["error", "response.failed"]
    assert events[-2]["code"] == events[-1]["response"]["error"]["code"] == "kv_load_failed"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"store": 0}, "store"),
        ({"top_logprobs": False}, "top_logprobs"),
        ({"background": True}, "background"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format.type"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"input": [{"type": "item_reference"}]}, "input[0].type"),
        ({"input": [{"type": "function_call_output"}]}, "input[0].call_id"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type",
        ),
        ({"input": [{"role": "user", "content": [{"type": []}]}]}, "input[0].content[0]"),
        ({"input": [{"role": [], "content": "x"}]}, "input[0].role"),
        ({"input": "one " * 600}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": "hot"}, "temperature"),
    ],
)
def test_what_a_response_cannot_be_asked_is_named(
    http: httpx.Client, changes: Json, param: str
) -> None:
    refused = http.post("/v1/responses", json={"model": MODEL, "input": "x", **changes})
    assert (refused.status_code, error_of(refused)["param"]) == (400, param)


# ---- Messages --------------------------------------------------------------------------------


def test_a_message_has_the_shape_that_its_clients_read(http: httpx.Client) -> None:
    answer = http.post("/v1/messages", json=asking(system=[{"type": "text", "text": "one"}])).json()
    assert answer.pop("id").startswith("msg_")
    counts = answer.pop("usage")
    assert answer == {
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": [{"type": "text", "text": "one" + HELLO}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
    }
    cached, fresh = counts["cache_read_input_tokens"], counts["input_tokens"]
    assert cached > 0
    assert counts["output_tokens"] == cached + fresh + 1


def test_counted_tokens_are_those_of_the_prompt(http: httpx.Client) -> None:
    body = asking()
    used = http.post("/v1/messages", json=body).json()["usage"]
    del body["max_tokens"]
    counted = http.post("/v1/messages/count_tokens", json=body).json()
    assert counted == {"input_tokens": used["input_tokens"] + used["cache_read_input_tokens"]}


def test_a_streamed_message_closes_what_it_opens(http: httpx.Client) -> None:
    events = events_of(http, "/v1/messages", asking())
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert "".join(event["delta"]["text"] for event in events[2:-3]) == HELLO
    assert events[0]["message"]["content"] == []
    num_at_first = events[0]["message"]["usage"]["output_tokens"]  # as many as came together
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert 1 <= num_at_first <= events[-2]["usage"]["output_tokens"] > 1


def test_a_quiet_message_is_kept_alive_by_pings_once_it_has_begun(
    new_gateway: Callable[..., RunningGateway],
) -> None:
    running = new_gateway(sse_keep_alive_interval=0.05)
    running.do(running.prefill.gates.first_token.clear)
    running.do(running.decode.gates.tokens.clear)
    url, body = f"{running.url}/v1/messages", asking(stream=True)
    with httpx.stream("POST", url, json=body, timeout=20) as response:
        lines = response.iter_lines()
        assert next(lines) == ": keep-alive"
        running.do(running.prefill.gates.first_token.set)
        early = list(itertools.takewhile(lambda line: line != "event: ping", lines))
        assert "event: message_start" in early
        assert next(lines) == 'data: {"type":"ping"}'
        running.do(running.decode.gates.tokens.set)
        assert "event: message_stop" in list(lines)


@pytest.mark.parametrize(
    ("changes", "reason", "sequence"),
    [
        ({"stop_sequences": ["how"]}, "stop_sequence", "how"),
        ({"max_tokens": 4}, "max_tokens", None),
    ],
)
def test_why_a_message_ended(
    http: httpx.Client, changes: Json, reason: str, sequence: str | None
) -> None:
    answer = http.post("/v1/messages", json=asking(**changes)).json()
    assert (answer["stop_reason"], answer["stop_sequence"]) == (reason, sequence)


def test_the_assistants_last_words_are_continued(http: httpx.Client) -> None:
    talk = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    open_end = http.post("/v1/messages/count_tokens", json={"messages": talk}).json()
    closed = http.post("/v1/messages/count_tokens", json={"messages": [*talk, talk[0]]}).json()
    tokens = http.post("/tokenize", json={"messages": talk, "continue_final_message": True}).json()
    assert open_end["input_tokens"] == tokens["count"] < closed["input_tokens"]


def test_thoughts_of_earlier_turns_are_left_out(http: httpx.Client) -> None:
    thought = {"type": "thinking", "thinking": "hm", "signature": ""}
    content = [thought, {"type": "text", "text": HELLO}]
    answer = http.post("/v1/messages", json=asking(messages=[{"role": "user", "content": content}]))
    assert answer.json()["content"][0]["text"] == HELLO


@pytest.mark.parametrize(
    ("changes", "status", "kind"),
    [
        ({"tools": [{"name": "f", "type": "bash_20250124"}]}, 400, "invalid_request_error"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, 400, "invalid_request_error"),
        ({"max_tokens": None}, 400, "invalid_request_error"),
        ({"max_tokens": 5000}, 400, "invalid_request_error"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            400,
            "invalid_request_error",
        ),
        ({"model": "nobody"}, 404, "not_found_error"),
    ],
)
def test_errors_of_messages_have_their_own_shape(
    http: httpx.Client, changes: Json, status: int, kind: str
) -> None:
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        if path.endswith("count_tokens") and {"max_tokens", "thinking"} & changes.keys():
            continue
        refused = http.post(path, json=asking(**changes))
        body = refused.json()
        assert refused.status_code == status
        assert body["type"] == "error"
        assert body["error"]["type"] == kind
        assert body["request_id"] == refused.headers["request-id"]


def test_an_error_of_a_message_names_its_field(http: httpx.Client) -> None:
    """Its shape has no other place for that."""
    words = {"type": "text", "text": "x"}
    talk = [{"role": "user", "content": [words, {"type": "image"}]}]
    refused = http.post("/v1/messages", json=asking(messages=talk)).json()
    told = "messages[0].content[1].type: Only text is supported here."
    assert refused["error"]["message"] == told
    refused = http.post("/v1/messages", json=asking(max_tokens=0)).json()
    assert refused["error"]["message"] == "max_tokens must be at least 1."


def test_errors_before_and_after_the_first_token(
    new_gateway: Callable[..., RunningGateway],
) -> None:
    running = new_gateway()
    events = events_until_kv_is_lost(running, "/v1/messages", asking())
    assert events[-1]["type"] == "error"
    assert events[-1]["error"]["type"] == "overloaded_error"
    failed = httpx.post(f"{running.url}/v1/messages", json=asking(), timeout=20)
    assert (failed.status_code, failed.json()["error"]["type"]) == (529, "overloaded_error")


def test_a_stranger_is_refused_in_the_shape_of_the_route(
    new_gateway: Callable[..., RunningGateway],
) -> None:
    running = new_gateway(api_key=("key",))
    headers = {"anthropic-version": "2023-06-01"}
    for refused in (
        httpx.post(f"{running.url}/v1/messages", json=asking()),
        httpx.get(f"{running.url}/v1/models", headers=headers),
    ):
        assert refused.status_code == 401
        told = refused.json()
        assert (told["type"], told["error"]["type"]) == ("error", "authentication_error")
    plain = httpx.get(f"{running.url}/v1/models")
    assert error_of(plain)["code"] == "invalid_api_key"


def test_a_model_that_is_not_there_is_missing_in_the_shape_of_its_client(
    http: httpx.Client,
) -> None:
    missing = http.get("/v1/models/nobody", headers={"anthropic-version": "2023-06-01"})
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found_error")
    assert missing.json()["request_id"] == missing.headers["request-id"]
    assert error_of(http.get("/v1/models/nobody"))["code"] == "model_not_found"


def test_a_bug_of_ours_is_told_in_the_shape_of_the_route(
    new_gateway: Callable[..., RunningGateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = new_gateway()
    monkeypatch.setattr(running.gateway, "validator", None)
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        failed = httpx.post(running.url + path, json=asking())
        told = failed.json()
        assert (failed.status_code, told["type"], told["error"]["type"]) == (
            *(500, "error", "api_error"),
        )
        assert told["request_id"] == failed.headers["request-id"]


def test_models_are_listed_in_both_shapes(http: httpx.Client) -> None:
    listed = http.get("/v1/models", headers={"anthropic-version": "2023-06-01"}).json()
    assert (listed["first_id"], listed["has_more"]) == (MODEL, False)
    assert listed["data"][0]["max_input_tokens"] == 512
    assert listed["data"][0]["created_at"].endswith("Z")
    one = http.get(f"/v1/models/{MODEL}", headers={"anthropic-version": "2023-06-01"}).json()
    assert one == listed["data"][0]
    assert one["lifecycle"] == "active"
    assert http.get("/v1/models").json()["object"] == "list"
