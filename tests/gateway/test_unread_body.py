"""Whoever is answered before its body was read gets the answer, and no connection is left in which
nobody reads or writes."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from gateway import http_server, unread_body

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.gateway.running_gateway import RunningGateway

ANSWERED_EARLY = {
    "no route": ("POST /v1/nothing", "", 404),
    "no such method": ("PUT /v1/completions", "", 405),
    "no media type of ours": ("POST /v1/completions", "content-type: text/plain\r\n", 415),
    "a probe": ("GET /livez", "", 200),
}
LENGTH = 100_000
NEXT = b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n"


@contextmanager
def connected(url: str) -> Iterator[socket.socket]:
    where = urlsplit(url)
    with socket.create_connection((where.hostname or "", where.port or 0), timeout=10) as client:
        yield client


def head(line: str, headers: str = "", *, length: int = LENGTH) -> bytes:
    told = f"{line} HTTP/1.1\r\nhost: x\r\n{headers}content-length: {length}\r\n\r\n"
    return told.encode()


def until_closed(client: socket.socket) -> bytes:
    """Raises `TimeoutError` for a connection that stays."""
    said = b""
    while part := client.recv(65536):
        said += part
    return said


def status_of(said: bytes) -> int:
    return int(said.split(b" ", 2)[1])


def is_closed_behind_one_answer(said: bytes, status: int) -> None:
    assert status_of(said) == status
    assert said.count(b"HTTP/1.1 ") == 1
    assert b"connection: close" in said


@pytest.mark.parametrize("case", ANSWERED_EARLY)
def test_the_connection_of_one_who_stops_sending_ends_behind_its_answer(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    line, headers, status = ANSWERED_EARLY[case]
    monkeypatch.setattr(unread_body, "DISCARD_SECONDS", 0.0)
    with connected(gateway.url) as client:
        client.sendall(head(line, headers) + b"x" * (LENGTH // 2))
        is_closed_behind_one_answer(until_closed(client), status)


def test_a_stranger_is_no_exception(
    new_gateway: Callable[..., RunningGateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = new_gateway(api_key=("key",))
    monkeypatch.setattr(unread_body, "DISCARD_SECONDS", 0.0)
    for url, line in (
        (running.url, "POST /v1/completions"),
        (running.admin.url, "PATCH /admin/v1/policy"),
    ):
        with connected(url) as client:
            client.sendall(head(line) + b"x")
            is_closed_behind_one_answer(until_closed(client), 401)


def test_nor_is_one_whose_body_does_not_come_in_time(
    new_gateway: Callable[..., RunningGateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = new_gateway(body_timeout=0.05)
    monkeypatch.setattr(unread_body, "DISCARD_SECONDS", 0.0)
    with connected(running.url) as client:
        client.sendall(head("POST /v1/completions") + b"x")
        is_closed_behind_one_answer(until_closed(client), 408)


@pytest.mark.parametrize("case", ANSWERED_EARLY)
def test_one_who_sends_the_rest_may_ask_again(gateway: RunningGateway, case: str) -> None:
    line, headers, status = ANSWERED_EARLY[case]
    with connected(gateway.url) as client:
        client.sendall(head(line, headers) + b"x" * (LENGTH // 2))
        client.sendall(b"x" * (LENGTH - LENGTH // 2))
        client.sendall(NEXT[:-2] + b"connection: close\r\n\r\n")
        first, second = until_closed(client).split(b"HTTP/1.1 ")[1:]
    assert first.startswith(str(status).encode())
    assert b"connection: close" not in first
    assert second.startswith(b"200")


def test_one_who_waits_to_be_told_to_send_is_not_told(gateway: RunningGateway) -> None:
    with connected(gateway.url) as client:
        client.sendall(head("POST /v1/nothing", "expect: 100-continue\r\n"))
        is_closed_behind_one_answer(until_closed(client), 404)


def test_one_who_wants_to_send_too_much_is_answered_at_once(gateway: RunningGateway) -> None:
    with connected(gateway.url) as client:
        length = unread_body.MAX_DISCARDED_BYTES + 1
        client.sendall(head("POST /v1/completions", length=length))
        is_closed_behind_one_answer(until_closed(client), 413)


def test_one_who_does_not_say_how_much_it_sends_is_heard_up_to_a_bound(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unread_body, "MAX_DISCARDED_BYTES", 1000)
    with connected(gateway.url) as client:
        client.sendall(
            b"POST /v1/nothing HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        client.sendall(b"7d0\r\n" + b"x" * 2000 + b"\r\n")
        is_closed_behind_one_answer(until_closed(client), 404)


def test_one_who_writes_all_before_it_reads_sees_its_answer(gateway: RunningGateway) -> None:
    """urllib does, and asks for the end of its connection."""
    request = urllib.request.Request(f"{gateway.url}/v1/nothing", data=b"x" * (16 << 20))
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=10)
    refused.value.close()
    assert refused.value.code == 404


@pytest.mark.parametrize("begins", [b"GET /version HTTP/1.1\r\n", b"\r\n"])
def test_the_next_head_on_a_connection_must_come_in_time_as_the_first(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch, begins: bytes
) -> None:
    with connected(gateway.url) as client:
        client.sendall(NEXT)
        said = b""
        while not said.endswith(b"}"):
            said += client.recv(65536)
        assert status_of(said) == 200
        monkeypatch.setattr(http_server, "HEAD_SECONDS", 0.0)
        client.sendall(begins)
        assert until_closed(client) == b""
