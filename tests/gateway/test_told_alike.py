"""Of a request that fails, the book, the metrics and the log say what its client is told, in every
API and wherever it fails."""

from __future__ import annotations

import json
import logging
import socket
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
import pytest

from cluster.errors import Overloaded, TransferFailed
from gateway import whole_answers
from gateway.frames import Frames

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gateway.request_book import EndedRequest
    from tests.gateway.running_gateway import RunningGateway

MODEL = "org/test-model"
TALK = [{"role": "user", "content": "one two three"}]
BODIES: dict[str, dict[str, Any]] = {
    "chat": {"messages": TALK, "max_tokens": 8},
    "completions": {"prompt": "one two three", "max_tokens": 8},
    "responses": {"input": "one two three", "max_output_tokens": 8},
    "messages": {"messages": TALK, "max_tokens": 8},
}
PATHS = {"chat": "/v1/chat/completions"}
UNAVAILABLE = {"messages": 529}  # as Anthropic's clients expect it; others are told 503


def asking(route: str, **changes: Any) -> dict[str, Any]:
    return {"model": MODEL, **BODIES[route], **changes}


def post(running: RunningGateway, route: str, **changes: Any) -> httpx.Response:
    url = running.url + PATHS.get(route, f"/v1/{route}")
    return httpx.post(url, json=asking(route, **changes), timeout=20)


@pytest.fixture
def running(
    new_gateway: Callable[..., RunningGateway], caplog: pytest.LogCaptureFixture
) -> Iterator[RunningGateway]:
    caplog.set_level(logging.INFO)
    made = new_gateway()
    yield made
    made.gateway.admission.is_closed = False  # who closes it stops its servers


def only_one(running: RunningGateway) -> EndedRequest:
    """What the book has, when the metrics have it, too."""
    running.until(lambda: running.gateway.measures.requests.total() == 1)
    [(_, how)] = running.gateway.book.last(10)
    return how


def is_told_alike(
    running: RunningGateway, caplog: pytest.LogCaptureFixture, route: str, status: int
) -> None:
    how, measures = only_one(running), running.gateway.measures
    assert (how.route, how.status, how.has_failed) == (route, status, True)
    assert dict(measures.requests) == {(route, status): 1}
    assert dict(measures.errors) == {(how.error, how.reason or ""): 1}
    told = [r.__dict__ for r in caplog.records if r.message in ("request ended", "request refused")]
    assert [(each["route"], each["status"]) for each in told] == [(route, status)]


def has_no_pair(running: RunningGateway, _: pytest.MonkeyPatch) -> None:
    running.call(running.decode.kill())
    running.until(lambda: not running.gateway.is_ready)


def loses_kv(running: RunningGateway, _: pytest.MonkeyPatch) -> None:
    running.decode.error = TransferFailed("The KV did not arrive.", reason="digest_mismatch")


def is_stopping(running: RunningGateway, _: pytest.MonkeyPatch) -> None:
    running.do(running.gateway.admission.close)


def is_full(running: RunningGateway, patch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise Overloaded("The cluster is full; ask again later.", reason="max_num_reqs")

    patch.setattr(running.gateway.admission, "admit", full)


@pytest.mark.parametrize("route", BODIES)
@pytest.mark.parametrize("breaks", [has_no_pair, loses_kv, is_stopping, is_full])
def test_a_request_that_cannot_be_served_now(
    running: RunningGateway,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    route: str,
    breaks: Callable[[RunningGateway, pytest.MonkeyPatch], None],
) -> None:
    breaks(running, monkeypatch)
    status = UNAVAILABLE.get(route, 503)
    assert post(running, route).status_code == status
    is_told_alike(running, caplog, route, status)


@pytest.mark.parametrize("route", BODIES)
def test_a_request_that_makes_no_sense(
    running: RunningGateway, caplog: pytest.LogCaptureFixture, route: str
) -> None:
    assert post(running, route, temperature=-1.0).status_code == 400
    is_told_alike(running, caplog, route, 400)


def breaks(*_: Any, **__: Any) -> Any:
    raise RuntimeError("a bug")


@pytest.mark.parametrize("is_stream", [False, True])
def test_an_answer_that_cannot_be_written_has_not_gone_well(
    running: RunningGateway, monkeypatch: pytest.MonkeyPatch, is_stream: bool
) -> None:
    monkeypatch.setattr(whole_answers, "answer_parts", breaks)
    monkeypatch.setattr(Frames, "render", breaks)
    assert post(running, "completions", stream=is_stream).status_code == 500
    how, measures = only_one(running), running.gateway.measures
    assert (how.status, how.error, how.finish) == (500, "internal", None)
    assert dict(measures.requests) == {("completions", 500): 1}
    running.until(lambda: running.decode.is_idle)


def begun(running: RunningGateway, body: bytes) -> socket.socket:
    """A client that has sent the head and half of `body`."""
    where = urlsplit(running.url)
    client = socket.create_connection((where.hostname or "", where.port or 0), timeout=20)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    client.sendall(head.encode() + body[: len(body) // 2])
    return client


def test_one_that_comes_while_the_gateway_begins_to_stop(
    running: RunningGateway, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was let in, and is not when its body has been read."""
    parts = running.gateway
    validated = parts.validator.completion

    async def closing(*arguments: Any) -> Any:
        request = await validated(*arguments)
        parts.admission.close()
        return request

    monkeypatch.setattr(parts.validator, "completion", closing)
    assert post(running, "completions").status_code == 503
    is_told_alike(running, caplog, "completions", 503)


def test_a_client_that_leaves_while_it_sends_has_left_and_got_no_error(
    running: RunningGateway,
) -> None:
    begun(running, json.dumps(asking("completions")).encode()).close()
    how, measures = only_one(running), running.gateway.measures
    assert (how.status, how.reason, how.has_failed) == (499, "client_gone", False)
    assert (measures.num_disconnected, dict(measures.requests)) == (1, {("completions", 499): 1})
