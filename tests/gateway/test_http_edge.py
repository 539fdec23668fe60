"""What may be wrong with a request has one typed answer; what is odd but clear is served."""

from __future__ import annotations

import gzip
import json
import socket
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
import jsonschema
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.gateway.running_gateway import RunningGateway

MODEL = "org/test-model"
OPEN_PATHS = ["/health", "/livez", "/readyz", "/version", "/metrics"]


def completion(**changes: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "one two", "max_tokens": 4, **changes}


def chat(**changes: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], **changes}


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["code"], str)
    return error


BAD_COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": [[]]}, "prompt[0]"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [True]}, "prompt[0]"),
    ({"prompt": [1, 10**6]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": ["x"] * 65}, "prompt"),
    ({"prompt": ["x"] * 33, "n": 2}, "n"),
    ({"n": 0}, "n"),
    ({"n": 65}, "n"),
    ({"n": 2, "best_of": 3}, "best_of"),
    ({"temperature": "0.7"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"repetition_penalty": 1e-38}, "repetition_penalty"),
    ({"top_p": 0}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": 10**9}, "prompt"),
    ({"min_tokens": 9}, "min_tokens"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": 1, "echo": True}, "echo"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"stop": [""]}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"suffix": "x"}, "suffix"),
    ({"cache_salt": "a/b"}, "cache_salt"),
    ({"cache_salt": "x" * 129}, "cache_salt"),
    ({"kv_transfer_params": {"do_remote_prefill": True}}, "kv_transfer_params"),
    ({"prompt_logprobs": 0}, "prompt_logprobs"),
    ({"bad_words": ["no"]}, "bad_words"),
    ({"allowed_token_ids": [1]}, "allowed_token_ids"),
    ({"regex": "a+"}, "regex"),
    ({"use_beam_search": 0}, "use_beam_search"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"priority": 2**40}, "priority"),
    ({"seed": "x"}, "seed"),
]
BAD_CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [{"role": "alien", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content[0].type",
    ),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
    ({"tools": []}, "tools"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"chat_template": "{{ x }}"}, "chat_template"),
    ({"echo": True}, "echo"),
    ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs.messages"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"store": True}, "store"),
    ({"store": 0}, "store"),
    ({"store": 0.0}, "store"),
    ({"verbosity": "low"}, "verbosity"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (
        {"continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
    ),
]


@pytest.mark.parametrize(("changes", "param"), BAD_COMPLETIONS)
def test_a_bad_completion_is_a_400_that_names_its_field(
    http: httpx.Client, changes: dict[str, Any], param: str
) -> None:
    response = http.post("/v1/completions", json=completion(**changes))
    assert response.status_code == 400
    error = error_of(response)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param


@pytest.mark.parametrize(("changes", "param"), BAD_CHATS)
def test_a_bad_chat_is_a_400_that_names_its_field(
    http: httpx.Client, changes: dict[str, Any], param: str
) -> None:
    response = http.post("/v1/chat/completions", json=chat(**changes))
    assert response.status_code == 400
    assert error_of(response)["param"] == param


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_who_wants_an_answer_stored_is_refused_and_told_what_may_be_sent(
    http: httpx.Client, path: str
) -> None:
    body = {**chat(), **completion(), "store": True}
    error = error_of(http.post(path, json=body))
    assert (error["param"], error["message"]) == (
        "store",
        "store is not supported here; leave it out, or send false.",
    )
    assert http.post(path, json={**body, "store": False}).status_code == 200


CHANGE_NOTHING: dict[str, Any] = {
    "user": "u-1",
    "metadata": {"team": "a"},
    "service_tier": "auto",
    "prompt_cache_key": "k",
    "safety_identifier": "s",
    "prediction": {"type": "content", "content": "x"},
    "modalities": ["text"],
    "bad_words": [],
    "echo": False,
    "verbosity": "medium",
    "parallel_tool_calls": True,
    "reasoning_effort": "low",
}


@pytest.mark.parametrize("name", CHANGE_NOTHING)
def test_a_field_that_changes_nothing_is_taken(http: httpx.Client, name: str) -> None:
    asked = chat(temperature=0.0)
    plain = http.post("/v1/chat/completions", json=asked).json()
    answer = http.post("/v1/chat/completions", json={**asked, name: CHANGE_NOTHING[name]}).json()
    assert answer["choices"] == plain["choices"]


def test_what_is_taken_and_ignored_is_documented_as_that(http: httpx.Client) -> None:
    schemas = http.get("/openapi.json").json()["components"]["schemas"]
    ignored = {"metadata", "service_tier", "prompt_cache_key", "safety_identifier"}
    of_body = {"ChatBody": {*ignored, "prediction"}, "ResponsesBody": {*ignored, "user"}}
    of_body["MessagesBody"] = {"metadata", "service_tier"}
    for body, names in of_body.items():
        said = {
            name
            for name, field in schemas[body]["properties"].items()
            if "ignored" in field.get("description", "")
        }
        assert said == names


@pytest.mark.parametrize(
    "body",
    [
        b"not json",
        b"[1, 2]",
        b"",
        b'{"temperature": NaN}',
        b'{"temperature": 1e999}',
        b'{"prompt": "\\ud800"}',
        b"\xff\xfe",
        b'{"a": ' * 40 + b"1" + b"}" * 40,
        b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    ],
)
def test_a_body_that_is_not_a_plain_object_is_a_400(http: httpx.Client, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    response = http.post("/v1/completions", content=body, headers=headers)
    assert response.status_code == 400
    error_of(response)


def test_fields_nobody_knows_and_nulls_are_ignored(http: httpx.Client) -> None:
    body = chat(unheard_of=1, temperature=None, stop=None, logprobs=None, tools=None, n=None)
    body["messages"][0]["cache_control"] = {"type": "ephemeral"}
    assert http.post("/v1/chat/completions", json=body).status_code == 200


def test_text_parts_are_joined(http: httpx.Client) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    body = chat(messages=[{"role": "user", "content": parts}])
    answer = http.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == "one\ntwo"


def test_a_model_need_not_be_named(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": "one", "max_tokens": 2}).json()
    assert answer["model"] == MODEL


def test_another_content_type_is_a_415(http: httpx.Client) -> None:
    response = http.post("/v1/completions", content=b"a=1", headers={"content-type": "text/plain"})
    assert response.status_code == 415
    error = error_of(response)
    assert error["code"] == "unsupported_media_type"
    assert error["message"] == "The content type must be application/json, not 'text/plain'."


def test_what_curl_sends_untold_is_answered_with_the_flag_it_lacks(http: httpx.Client) -> None:
    headers = {"content-type": "application/x-www-form-urlencoded"}
    response = http.post("/v1/completions", content=b"{}", headers=headers)
    assert response.status_code == 415
    told = "With curl: -H 'Content-Type: application/json'."
    assert error_of(response)["message"].endswith(told)


def test_a_compressed_body_is_a_415_that_says_so(http: httpx.Client) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    response = http.post("/v1/completions", content=gzip.compress(b"{}"), headers=headers)
    assert response.status_code == 415
    assert "'gzip'" in error_of(response)["message"]
    headers["content-encoding"] = "identity"
    body = json.dumps(completion()).encode()
    assert http.post("/v1/completions", content=body, headers=headers).status_code == 200


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_over_the_limit_is_a_413(http: httpx.Client, is_chunked: bool) -> None:
    body = b'{"prompt": "' + b"x" * (3 << 20) + b'"}'
    content: Any = iter([body[: 1 << 20], body[1 << 20 :]]) if is_chunked else body
    response = http.post(
        "/v1/completions", content=content, headers={"content-type": "application/json"}
    )
    assert response.status_code == 413
    assert error_of(response)["code"] == "request_too_large"


def test_unknown_routes_and_methods_have_error_bodies(http: httpx.Client) -> None:
    missing = http.get("/v1/nothing")
    assert (missing.status_code, error_of(missing)["code"]) == (404, "not_found")
    method = http.get("/v1/completions")
    assert (method.status_code, error_of(method)["code"]) == (405, "method_not_allowed")
    for path in ("/v1/embeddings", "/v1/../admin/v1/nodes", "/admin/v1/nodes"):
        assert http.post(path, json={}).status_code == 404


@pytest.mark.parametrize(
    "path", ["/v1/completions/", "//v1/completions", "/v1//completions//", "/v1/completions"]
)
def test_slashes_too_many_do_not_matter(http: httpx.Client, path: str) -> None:
    url = str(http.base_url).rstrip("/") + path
    assert http.post(url, json=completion()).status_code == 200


def test_the_clients_request_id_is_on_every_answer(http: httpx.Client) -> None:
    headers = {"x-request-id": "job-7"}
    good = http.post("/v1/completions", json=completion(), headers=headers)
    assert good.headers["x-request-id"] == good.headers["request-id"] == "job-7"
    assert good.json()["id"] == "cmpl-job-7"
    bad = http.post("/v1/completions", json={}, headers=headers)
    assert bad.headers["x-request-id"] == "job-7"
    assert http.get("/nowhere", headers=headers).headers["x-request-id"] == "job-7"


def test_a_request_id_is_cleaned_or_made(http: httpx.Client) -> None:
    dirty = {"x-request-id": "a b<script>\t;" + "x" * 300}
    cleaned = http.get("/livez", headers=dirty).headers["x-request-id"]
    assert cleaned.startswith("abscriptx")
    assert len(cleaned) == 128
    made = [http.get("/livez").headers["x-request-id"] for _ in range(2)]
    assert made[0] != made[1]


@pytest.mark.parametrize("value", ["0", "-5", "soon", "1.5", "99999999999999", "1" * 5000])
def test_a_deadline_that_makes_no_sense_is_a_400(http: httpx.Client, value: str) -> None:
    headers = {"x-request-deadline-ms": value}
    response = http.post("/v1/completions", json=completion(), headers=headers)
    assert response.status_code == 400
    assert error_of(response)["param"] == "X-Request-Deadline-Ms"


@pytest.mark.parametrize(("took", "left"), [(40.0, 20.0), (70.0, None)])
def test_a_deadline_counts_from_the_arrival_of_the_request(
    new_gateway: Callable[..., RunningGateway],
    monkeypatch: pytest.MonkeyPatch,
    took: float,
    left: float | None,
) -> None:
    """Its client waits for as long, whether the body came slowly or the prompt took its time; of
    one that nobody waits for any more no node hears."""
    running = new_gateway()
    gateway = running.gateway
    clock, completion = gateway.clock, gateway.validator.completion

    async def slow_completion(*asked: Any) -> Any:
        monkeypatch.setattr(gateway, "clock", lambda: clock() + took)
        return await completion(*asked)

    monkeypatch.setattr(gateway.validator, "completion", slow_completion)
    asked = {"model": MODEL, "prompt": "one two three", "max_tokens": 2}
    headers = {"x-request-deadline-ms": "60000"}
    response = httpx.post(f"{running.url}/v1/completions", json=asked, headers=headers)
    assert response.status_code == (504 if left is None else 200)
    deadlines = [each.deadline_seconds or 0.0 for each in running.prefill.submitted.values()]
    assert len(deadlines) == (0 if left is None else 1)
    assert all(0 < each <= (left or 0.0) for each in deadlines)


def test_a_deadline_that_passes_is_a_504_and_frees_the_node(
    gateway: RunningGateway, http: httpx.Client
) -> None:
    gateway.do(gateway.prefill.gates.first_token.clear)
    headers = {"x-request-deadline-ms": "150"}
    try:
        response = http.post("/v1/completions", json=completion(), headers=headers)
        assert response.status_code == 504
        assert error_of(response)["code"] == "deadline_exceeded"
        gateway.until(lambda: gateway.prefill.is_idle)
    finally:
        gateway.do(gateway.prefill.gates.first_token.set)
    sent = list(gateway.prefill.submitted.values())[-1]
    assert sent.deadline_seconds is not None
    assert sent.deadline_seconds <= 0.15


def test_stream_headers_let_events_through_proxies(http: httpx.Client) -> None:
    with http.stream("POST", "/v1/completions", json=completion(stream=True)) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-accel-buffering"] == "no"
        assert response.read().endswith(b"data: [DONE]\n\n")


def test_a_chat_stream_has_exactly_these_bytes(http: httpx.Client) -> None:
    body = chat(stream=True, max_tokens=4, stream_options={"include_usage": True})
    headers = {"x-request-id": "golden"}
    raw = http.post("/v1/chat/completions", json=body, headers=headers).text
    frames = raw.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    events = [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]
    created = events[0]["created"]
    head = (
        f'data: {{"id":"chatcmpl-golden","object":"chat.completion.chunk","created":{created},'
        f'"model":"{MODEL}","choices":['
    )
    role = (
        '{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
    )
    end = '{"index":0,"delta":{},"logprobs":null,"finish_reason":"length","stop_reason":null}'
    assert frames[0] == f'{head}{role}],"usage":null}}'
    assert frames[-4] == f'{head}{end}],"usage":null}}'
    for frame, event in zip(frames[1:-4], events[1:-2], strict=True):
        text = json.dumps(event["choices"][0]["delta"]["content"])
        assert frame == (
            f'{head}{{"index":0,"delta":{{"content":{text}}},"logprobs":null,'
            '"finish_reason":null}],"usage":null}'
        )
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("separate_keys", [True, False])
def test_what_is_cached_for_one_key_is_hit_by_another_unless_keys_are_kept_apart(
    new_gateway: Callable[..., RunningGateway], separate_keys: bool
) -> None:
    running = new_gateway(api_key=("key-one", "key-two"), separate_keys=separate_keys)
    asked = {"model": MODEL, "prompt": "one two three", "max_tokens": 2}
    salts = []
    for headers, changes in (
        ({"authorization": "Bearer key-one"}, {}),
        ({"x-api-key": "key-one"}, {}),
        ({"x-api-key": "key-two"}, {}),
        ({"x-api-key": "key-two"}, {"cache_salt": "mine"}),
    ):
        url = f"{running.url}/v1/completions"
        assert httpx.post(url, json=asked | changes, headers=headers).status_code == 200
        salts.append(running.prefill.submitted.popitem()[1].cache_salt)
    one, again, two, two_of_its_own = salts
    assert one == again
    assert (one != two) is separate_keys
    assert two_of_its_own == two + b"mine"
    assert not [salt for salt in salts if b"key" in salt]


def test_keys_are_asked_for_everywhere_but_on_open_paths(
    new_gateway: Callable[..., RunningGateway],
) -> None:
    running = new_gateway(api_key=("key-one", "key-two"))
    with httpx.Client(base_url=running.url) as http:
        for path in OPEN_PATHS:
            assert http.get(path).status_code == 200
        closed = ["/v1/models", "/v1/nothing", "/openapi.json", "//v1/models", "/metrics/x"]
        for path in closed:
            response = http.get(running.url + path)
            assert response.status_code == 401, path
            assert error_of(response)["code"] == "invalid_api_key"
            assert "x-request-id" in response.headers
        good: list[dict[str, str]] = [
            {"authorization": "Bearer key-one"},
            {"authorization": "bearer key-two"},
            {"x-api-key": "key-two"},
        ]
        bad: list[dict[str, str]] = [
            {"authorization": "Bearer key-on"},
            {"authorization": "Basic key-one"},
            {"authorization": "Bearer"},
            {"x-api-key": "KEY-ONE"},
        ]
        for headers in good:
            assert http.get("/v1/models", headers=headers).status_code == 200
        for headers in bad:
            assert http.get("/v1/models", headers=headers).status_code == 401
        refused = http.post("/v1/completions", json=completion(), headers=bad[0])
        assert refused.status_code == 401


def test_a_head_over_the_limit_is_refused(gateway: RunningGateway) -> None:
    parts = urlsplit(gateway.url)
    with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=10) as raw:
        raw.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\nx-long: " + b"y" * 17_000)
        assert raw.recv(100).startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize("name", ["upgrade", "Upgrade"])
def test_who_offers_another_protocol_is_answered_in_this_one(
    gateway: RunningGateway, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """As Java's client does with its first request: the parser took the body for that protocol."""
    offer = {"connection": "Upgrade, HTTP2-Settings", name: "h2c", "http2-settings": "AAEAAEAA"}
    with httpx.Client(base_url=gateway.url, timeout=20) as http:
        for headers in (offer, {}, offer):
            response = http.post("/v1/completions", json=completion(), headers=headers)
            assert response.status_code == 200
        body = iter([b'{"prompt": "one \\n', b'upgrade: two"}'])  # a chunk of it begins so
        tokens = http.post("/tokenize", content=body, headers=offer).json()
        text = http.post("/detokenize", json={"tokens": tokens["tokens"]}).json()["prompt"]
        assert text.endswith("upgrade: two")
    assert not [each for each in caplog.messages if "upgrade" in each.lower()]


def test_tokenize_and_detokenize_are_each_others_reverse(http: httpx.Client) -> None:
    tokens = http.post("/tokenize", json={"prompt": "one two"}).json()
    assert tokens["count"] == len(tokens["tokens"])
    assert tokens["max_model_len"] == 512
    text = http.post("/detokenize", json={"tokens": tokens["tokens"]}).json()
    assert text == {"prompt": "<bos>one two"}
    talk = {"messages": [{"role": "user", "content": "Hi"}], "return_token_strs": True}
    strings = http.post("/tokenize", json=talk).json()["token_strs"]
    assert strings[:2] == ["<bos>", "<|user|>"]
    assert http.post("/detokenize", json={"tokens": [10**9]}).status_code == 400
    assert http.post("/tokenize", json={}).status_code == 400


def test_the_api_documents_itself(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/health"):
        assert path in document["paths"]
    assert "messages" in document["components"]["schemas"]["ChatBody"]["properties"]


def test_what_probes_and_metrics_answer_is_documented_as_the_text_that_it_is(
    http: httpx.Client,
) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    for path in ("/livez", "/readyz", "/health", "/metrics"):
        said = paths[path]["get"]["responses"]
        assert list(said["200"]["content"]) == ["text/plain"]
        assert http.get(path).headers.get("content-type", "text/plain").startswith("text/plain")
    for path in ("/readyz", "/health"):
        assert list(paths[path]["get"]["responses"]["503"]["content"]) == ["text/plain"]


def test_each_default_that_is_documented_fits_what_is_documented_of_its_field(
    http: httpx.Client,
) -> None:
    document = http.get("/openapi.json").json()
    num_defaults = 0
    for name, schema in document["components"]["schemas"].items():
        for field, rule in schema.get("properties", {}).items():
            if "default" in rule:
                num_defaults += 1
                at = {"$ref": f"#/components/schemas/{name}/properties/{field}"}
                whole = {"components": document["components"], **at}
                jsonschema.validate(rule["default"], whole)
    assert num_defaults > 50


def test_errors_are_documented_as_they_are(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    whole = {"components": document["components"], "$ref": "#/components/schemas/Error"}
    for path in ("/v1/chat/completions", "/v1/messages"):
        jsonschema.validate(http.post(path, json={}).json(), whole)
    for path, operations in document["paths"].items():
        of_its_own = {"503"} if path in ("/readyz", "/health") else set()  # text, for people
        for operation in operations.values():
            assert set(operation["responses"]) == {"200", "default", *of_its_own}


def test_no_error_tells_of_the_inside(http: httpx.Client) -> None:
    bodies = [completion(**changes) for changes, _ in BAD_COMPLETIONS]
    for body in bodies:
        text = http.post("/v1/completions", json=body).text
        for leak in ("Traceback", "site-packages", "/home", "0x", "127.0.0.1"):
            assert leak not in text
