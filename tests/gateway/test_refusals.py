"""What a client that is refused is told: what happened, and what to do about it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import httpx

from gateway.schemas import MAX_INPUT_CHARS
from tests.gateway.test_http_edge import MODEL, chat, completion, error_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

    from tests.gateway.running_gateway import RunningGateway


def words(number: int) -> dict[str, Any]:
    return chat(messages=[{"role": "user", "content": "one " * number}])


def num_tokens(http: httpx.Client, body: dict[str, Any]) -> int:
    return int(http.post("/tokenize", json={"messages": body["messages"]}).json()["count"])


def test_a_prompt_too_long_is_an_overflow_without_max_tokens_too(http: httpx.Client) -> None:
    longest = num_tokens(http, words(1)) - 1
    for number in (512 - longest, 600):  # leaves no room for a token; does not fit itself
        body = words(number)
        body.pop("max_tokens", None)
        prompt = num_tokens(http, body)
        assert prompt >= 512
        error = error_of(http.post("/v1/chat/completions", json=body))
        assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
        assert (
            f"you requested {prompt + 1} tokens ({prompt} in the messages, 1 in"
            in (error["message"])
        )


def test_a_wrong_model_hears_which_there_are(http: httpx.Client) -> None:
    refused = http.post("/v1/completions", json=completion(model="nobody"))
    assert error_of(refused)["message"] == (
        f"The model 'nobody' does not exist; this server has '{MODEL}', 'alias', 'claude-*'."
    )


def test_a_wrong_route_hears_its_name_and_of_a_right_one(http: httpx.Client) -> None:
    message = error_of(http.post("/v1/embeddings", json={}))["message"]
    assert "/v1/embeddings" in message
    assert "/v1/chat/completions" in message
    method = http.get("/v1/completions")
    assert method.headers["allow"] == "POST"
    assert error_of(method)["message"] == "/v1/completions takes POST."


def test_an_empty_list_is_refused_in_plain_words(http: httpx.Client) -> None:
    error = error_of(http.post("/v1/chat/completions", json=chat(messages=[])))
    assert error["message"] == "messages: list should have at least 1 item, not 0."


def test_the_name_of_a_wrong_field_is_cut(http: httpx.Client) -> None:
    bias = {"7" * 100_000: "much"}
    refused = http.post("/v1/completions", json=completion(logit_bias=bias))
    assert error_of(refused)["param"] == "logit_bias." + "7" * MAX_INPUT_CHARS
    assert len(refused.content) < 1000


def test_no_key_and_a_wrong_one_are_told_apart(
    new_gateway: Callable[..., RunningGateway],
) -> None:
    running = new_gateway(api_key=("key-one",))
    with httpx.Client(base_url=running.url) as http:
        none = error_of(http.get("/v1/models"))["message"]
        wrong = error_of(http.get("/v1/models", headers={"x-api-key": "key-two"}))["message"]
    assert none.startswith("No API key was sent. Send it as")
    assert wrong.startswith("This API key is not valid. Send it as")


def test_what_is_refused_is_in_the_log_without_what_the_client_wrote(
    http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gateway.http_errors")
    http.post("/v1/completions", json=completion(temperature="a secret"))
    http.get("/v1/nothing")
    facts = [
        (record.__dict__["route"], record.__dict__["status"], record.__dict__["param"])
        for record in caplog.records
        if record.message == "request refused"
    ]
    assert facts == [("completions", 400, "temperature"), ("/v1/nothing", 404, None)]
    assert "a secret" not in str([record.__dict__ for record in caplog.records])


def test_a_path_of_a_stranger_is_cut_in_the_log(
    new_gateway: Callable[..., RunningGateway], caplog: pytest.LogCaptureFixture
) -> None:
    running = new_gateway(api_key=("key",))
    caplog.set_level(logging.INFO, "gateway.http_errors")
    httpx.get(f"{running.url}/{'x' * 10_000}")
    [refused] = [each for each in caplog.records if each.message == "request refused"]
    assert refused.__dict__["route"] == "/" + "x" * 199


def test_pages_of_allowed_origins_may_ask_and_read_and_no_others(
    new_gateway: Callable[..., RunningGateway],
) -> None:
    page = "http://localhost:3000"
    running = new_gateway(api_key=("key",), allowed_origins=(page,))
    asking = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "x-api-key",
    }
    with httpx.Client(base_url=running.url) as http:
        permitted = http.options("/v1/completions", headers={"origin": page, **asking})
        assert permitted.status_code == 200
        assert permitted.headers["access-control-allow-origin"] == page
        assert permitted.headers["access-control-allow-headers"] == "x-api-key"
        answer = http.post(
            "/v1/completions", json=completion(), headers={"origin": page, "x-api-key": "key"}
        )
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, page)
        readable = answer.headers["access-control-expose-headers"].split(", ")
        assert {"x-request-id", "retry-after", "retry-after-ms", "x-should-retry"} <= {*readable}
        keyless = http.post("/v1/completions", json=completion(), headers={"origin": page})
        assert keyless.status_code == 401, "an origin is no key"
        assert keyless.headers["access-control-allow-origin"] == page, "the page may read why"
        other = http.options("/v1/completions", headers={"origin": "http://other", **asking})
        assert "access-control-allow-origin" not in other.headers
