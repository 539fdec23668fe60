"""Rows C1 to C4 of the fault matrix: clients that leave, read slowly, send garbage, ask twice."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from tests.e2e.cluster_process import eventually
from tests.faults.asks import Ask, draw_prompt
from tests.faults.cluster_rows import NUM_TOKENS, SEED
from tests.faults.nemesis import verify

if TYPE_CHECKING:
    from tests.faults.cluster_rows import Rows

pytestmark = pytest.mark.faults
BURST = 100
MORE_THAN_A_SOCKET_HOLDS = {  # about 9 MB
    "model": "pocket",
    "messages": [{"role": "user", "content": "Tell me all of it."}],
    "max_tokens": 1500,
    "ignore_eos": True,
    "n": 4,
    "logprobs": True,
    "top_logprobs": 20,
    "stream": True,
}
LEFT_WITHIN_SECONDS = 60.0  # --write-timeout is 30, behind what the socket takes
READS_WITHIN_SECONDS = 10.0


@pytest.mark.parametrize("by_reset", [False, True], ids=["fin", "rst"])
def test_c1_clients_leave_in_any_phase(cached: Rows, by_reset: bool) -> None:
    asks = [replace(ask, leaves_by_reset=by_reset) for ask in cached.asks]
    with cached.load(asks, leaves_after=[0, 1, NUM_TOKENS // 2]) as history:
        pass
    assert history.kinds().count("left") == 3
    cached.check(history)
    assert history.codes() == set()
    cached.check_recovered()


def test_c1_a_hundred_clients_leave_at_once_and_the_next_is_served(cached: Rows) -> None:
    draw = random.Random(SEED)
    burst = [
        Ask(number=number, prompt=draw_prompt(draw, 100, 200), num_tokens=512, leaves_after=1)
        for number in range(BURST)
    ]
    with cached.load(burst) as history:
        pass
    assert history.kinds().count("left") + len(history.erred()) == BURST
    assert history.codes() <= {"overloaded"}
    cached.check_recovered()


def test_c2_a_slow_reader_is_left_behind_and_others_are_not(cached: Rows) -> None:
    """It reads nothing of a long stream, which does not end for it then."""
    address = urlsplit(cached.cluster.urls[0])
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    slow.connect((address.hostname, address.port))
    body = json.dumps(MORE_THAN_A_SOCKET_HOLDS).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    slow.sendall(head.encode() + body)
    verify(lambda: bool(cached.cluster.admin("requests")["requests"]), "it was not taken in")
    with cached.load() as history:
        pass
    cached.check(history)
    assert history.codes() == set()
    verify(
        lambda: any("stopped reading its answer" in line for line in cached.cluster.lines),
        "the gateway still waits for it",
        seconds=LEFT_WITHIN_SECONDS,
    )
    slow.settimeout(READS_WITHIN_SECONDS)
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while part := slow.recv(1 << 16):
            received += part
    slow.close()
    assert b"chat.completion.chunk" in received
    assert b"[DONE]" not in received
    cached.check_recovered()


GARBAGE: dict[str, bytes] = {
    "nothing": b"",
    "no json": b"{",
    "a list": b"[]",
    "deep": b"[" * 100_000,
    "wrong types": b'{"model": 5, "prompt": {}, "max_tokens": "x"}',
    "huge number": b'{"model": "pocket", "prompt": "x", "max_tokens": 1e308}',
    "negative id": b'{"model": "pocket", "prompt": [-1], "max_tokens": 1}',
    "id beyond the vocabulary": b'{"model": "pocket", "prompt": [999999999], "max_tokens": 1}',
    "no prompt": b'{"model": "pocket", "prompt": [], "max_tokens": 1}',
    "nan": b'{"model": "pocket", "prompt": "x", "temperature": NaN}',
    "not utf-8": b'{"model": "pocket", "prompt": "\xff\xfe"}',
    "too many": b'{"model": "pocket", "prompt": "x", "n": 100000}',
}


def test_c3_garbage_is_refused_and_kills_nobody(cached: Rows) -> None:
    pids = cached.cluster.pids()
    draw = random.Random(SEED)
    bodies = [*GARBAGE.values(), *(draw.randbytes(200) for _ in range(50))]
    for body in bodies:
        for path in ("completions", "chat/completions"):
            request = urllib.request.Request(
                f"{cached.cluster.urls[0]}/{path}",
                data=body,
                headers={"content-type": "application/json"},
            )
            with pytest.raises(urllib.error.HTTPError) as refusal:
                urllib.request.urlopen(request, timeout=30)
            assert 400 <= refusal.value.code < 500
            assert b"Traceback" not in refusal.value.read()
    assert cached.cluster.pids() == pids
    cached.check_recovered()


def test_c4_one_request_id_twice_is_two_requests_that_get_the_same(cached: Rows) -> None:
    """The API has no idempotency keys, so nothing is billed once for two. What must hold: two
    requests under one id do not mix, both end, and both count."""
    ask = replace(cached.asks[0], is_stream=False)

    def answer(_: int) -> list[int]:
        request = urllib.request.Request(
            f"{cached.cluster.urls[0]}/completions",
            data=json.dumps(ask.body).encode(),
            headers={**ask.headers, "content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=ask.deadline_seconds) as response:
            tokens: list[int] = json.load(response)["choices"][0]["token_ids"]
            return tokens

    ended = cached.counted("baton_requests_total", ["gateway"], status="200")
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(answer, range(2)))
    assert answers == [list(cached.oracle[0].token_ids)] * 2
    eventually(
        lambda: cached.counted("baton_requests_total", ["gateway"], status="200") == ended + 2
    )
    cached.check_recovered()
