"""What one client asks for at length does not hold up the tokens of all others."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from gateway.chat_messages import num_chars
from gateway.choice import Choice, Piece
from gateway.held_answer import HeldAnswer
from gateway.logprob_answers import TOKENS_OF_A_PART
from gateway.streaming import StreamWriter
from gateway.tokenizer import INLINE_CHARS, Tokenizer
from gateway.whole_answers import PART_BYTES, TURN_SECONDS, Rendered
from tests.cluster.conftest import ManualClock
from tests.gateway.test_failures import everything_is_given_back

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.gateway.running_gateway import RunningGateway

MODEL = "org/test-model"


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The first word of each thread that worked on text."""
    seen: set[str] = set()

    def watched(work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            seen.add(threading.current_thread().name.split("_")[0])
            return work(*arguments, **options)

        return call

    for name in ("piece", "decode", "encode_now"):
        monkeypatch.setattr(Tokenizer, name, watched(getattr(Tokenizer, name)))
    return seen


def test_long_texts_are_taken_apart_and_put_together_on_threads(
    http: httpx.Client, threads: set[str]
) -> None:
    text = "one two " * INLINE_CHARS
    answer = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert len(answer["token_strs"]) == answer["count"] > INLINE_CHARS
    said = http.post("/detokenize", json={"tokens": answer["tokens"]}).json()
    assert said == {"prompt": f"<bos>{text}"}
    assert threads == {"tokenize"}


CALL = {"function": {"name": "f", "arguments": {"a": "of any length"}}}


@pytest.mark.parametrize(
    ("message", "tools"),
    [
        ({"content": "x" * INLINE_CHARS}, []),
        ({"content": "", "reasoning_content": "x" * INLINE_CHARS}, []),
        ({"content": "", "tool_calls": [CALL]}, []),
        ({"content": "x"}, [CALL]),
    ],
    ids=["words", "thoughts", "calls", "tools"],
)
def test_what_may_take_a_template_long_is_rendered_on_threads(
    message: dict[str, Any], tools: list[Any]
) -> None:
    """A thousand tools take it sixty milliseconds, however short the words are."""
    assert num_chars([{"role": "assistant", **message}], tools) > INLINE_CHARS
    assert num_chars([{"role": "user", "content": "x"}], []) < INLINE_CHARS


LONG = {
    "max_tokens": 200,
    "n": 3,
    "ignore_eos": True,
    "return_token_ids": True,
}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi " * 60}], **LONG}
PLAIN = {"model": MODEL, "prompt": "one two " * 30, **LONG}
LOGPROBS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 20}),
    ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 0}),
    ("/v1/completions", {**PLAIN, "logprobs": 20}),
    ("/v1/completions", {**PLAIN, "logprobs": 0}),
]


def streamed(http: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of each choice's stream, put together as log-probabilities are."""
    with http.stream("POST", path, json={**body, "stream": True}) as response:
        lines = [line[6:] for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    found: list[dict[str, Any]] = [{} for _ in range(body["n"])]
    for line in lines[:-1]:
        for chunk in json.loads(line)["choices"]:
            for name, values in (chunk["logprobs"] or {}).items():
                if values is not None:
                    found[chunk["index"]].setdefault(name, []).extend(values)
    return found


@pytest.mark.parametrize(("path", "body"), LOGPROBS)
def test_a_long_answer_is_sent_in_parts_that_are_what_its_stream_says(
    path: str, body: dict[str, Any], http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.whole_answers.PART_BYTES", 1024)
    response = http.post(path, json=body)
    assert "content-length" not in response.headers
    answer = response.json()
    assert answer["usage"]["completion_tokens"] == 3 * 200
    for choice, logprobs in zip(answer["choices"], streamed(http, path, body), strict=True):
        assert len(choice["token_ids"]) == 200
        assert choice["finish_reason"] == "length"
        told = {name: values for name, values in choice["logprobs"].items() if values is not None}
        assert told == logprobs
    monkeypatch.undo()
    assert http.post(path, json={**body, "seed": 1, "max_tokens": 9}).headers["content-length"]


def test_an_answer_is_read_and_written_in_turns(
    new_gateway: Callable[..., RunningGateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for all of it: neither while its tokens come, nor while it is rendered."""
    running = new_gateway(node_options={"step_seconds": 0.002})
    gathered: list[int] = []
    read: list[int] = []
    rendered: list[int] = []
    take, logprobs = Choice.take, HeldAnswer.logprobs

    def taken(choice: Choice, max_tokens: int | None = None) -> Piece:
        gathered.append(choice.num_unread_tokens)
        piece = take(choice, max_tokens)
        read.append(len(piece.token_ids))
        return piece

    def held(answer: HeldAnswer, start: int, end: int) -> list[Any]:
        found = logprobs(answer, start, end)
        rendered.append(len(found))
        return found

    monkeypatch.setattr(Choice, "take", taken)
    monkeypatch.setattr(HeldAnswer, "logprobs", held)
    path, body = LOGPROBS[0]
    assert httpx.post(running.url + path, json=body, timeout=20).status_code == 200
    assert sum(read) == sum(rendered) == 3 * 200
    assert max(gathered) < 150, "what a busy node merges comes at once, not nearly all of it"
    assert max(rendered) <= TOKENS_OF_A_PART


def test_others_have_their_turn_while_much_is_rendered_into_little() -> None:
    """Hundreds of parts fill one write: of a plain completion the tokens alone, say."""
    clock = ManualClock()
    log: list[str] = []

    def parts() -> Iterator[bytes]:
        for _ in range(4):
            log.append("part")
            clock.advance(0.6 * TURN_SECONDS)
            yield b"x"
        yield b"y" * PART_BYTES
        yield b"z"

    async def others() -> None:
        while True:
            log.append("turn")
            await asyncio.sleep(0)

    async def main() -> None:
        rendered = Rendered(parts(), clock)
        busy = asyncio.create_task(others())
        assert await rendered.next() == b"xxxx" + b"y" * PART_BYTES
        busy.cancel()
        assert log == ["part", "part", "turn"] * 2
        assert [await rendered.next(), await rendered.next()] == [b"z", b""]

    asyncio.run(main())


def has_left_without_its_answer(running: RunningGateway) -> None:
    """So say the book and the metrics, though all of it was there."""
    measures = running.gateway.measures
    running.until(lambda: measures.requests.total() == 1)
    [(_, how)] = running.gateway.book.last(2)
    assert (how.status, how.reason) == (499, "client_gone")
    assert list(measures.requests) == [("chat", 499)]
    assert measures.num_disconnected == 1


def test_a_client_that_leaves_a_long_answer_gives_everything_back(
    new_gateway: Callable[..., RunningGateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.whole_answers.PART_BYTES", 1024)
    running = new_gateway(node_options={"max_model_len": 4096})
    parts: list[int] = []
    dumps = HeldAnswer.logprobs

    def counted(answer: HeldAnswer, start: int, end: int) -> list[Any]:
        parts.append(start)
        return dumps(answer, start, end)

    monkeypatch.setattr(HeldAnswer, "logprobs", counted)
    path, body = LOGPROBS[0]
    body = {**body, "max_tokens": 400, "n": 16}
    with httpx.stream("POST", running.url + path, json=body, timeout=20) as response:
        assert response.status_code == 200
        next(response.iter_raw())
    has_left_without_its_answer(running)
    everything_is_given_back(running)
    assert len(parts) < 16 * 400 // TOKENS_OF_A_PART, "nobody renders for who has left"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_does_not_read_a_long_answer_is_cut_off(
    new_gateway: Callable[..., RunningGateway], caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    """Its connection, too: one that is closed in order stays until all has been read."""
    caplog.set_level("INFO", "gateway.routes.generate")
    running = new_gateway(write_timeout=0.2, node_options={"max_model_len": 4096})
    path, body = LOGPROBS[0]
    body = {**body, "max_tokens": 400, "n": 16, "stream": stream}
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n"
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((running.public.host, running.public.port))
        client.sendall(head.encode() + data)
        told = "a client stopped reading its answer: it is cut off"
        running.until(lambda: told in caplog.messages)
        running.until(lambda: not running.public._server.server_state.connections)
    assert not [each for each in caplog.messages if "ASGI" in each]
    has_left_without_its_answer(running)
    everything_is_given_back(running)


@pytest.mark.parametrize(("path", "body"), [LOGPROBS[0], LOGPROBS[2]])
def test_more_log_probabilities_than_can_be_held_are_refused_unless_they_are_streamed(
    path: str, body: dict[str, Any], new_gateway: Callable[..., RunningGateway]
) -> None:
    running = new_gateway(max_whole_logprobs=3 * 200 * 21)
    url = running.url + path
    assert httpx.post(url, json=body, timeout=20).status_code == 200
    more = {**body, "max_tokens": 201}
    error = httpx.post(url, json=more, timeout=20).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_value", "max_tokens")
    assert "12600" in error["message"]
    with httpx.stream("POST", url, json={**more, "stream": True}, timeout=20) as response:
        assert response.status_code == 200
        assert response.read().endswith(b"[DONE]\n\n")


def test_an_answer_whose_length_nobody_asked_for_ends_where_it_cannot_be_held_any_more(
    new_gateway: Callable[..., RunningGateway],
) -> None:
    running = new_gateway(max_whole_logprobs=3 * 50 * 21 + 1)
    path, body = LOGPROBS[0]
    body = {name: value for name, value in body.items() if name != "max_tokens"}
    answer = httpx.post(running.url + path, json=body, timeout=20).json()
    assert answer["usage"]["completion_tokens"] == 3 * 50
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}


def test_prompts_that_are_echoed_to_a_stream_are_written_one_by_one(
    new_gateway: Callable[..., RunningGateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen choices whose first tokens come together are not one write of sixteen prompts."""
    running = new_gateway()
    monkeypatch.setattr("gateway.streaming.MAX_WRITE_BYTES", 1024)
    running.do(running.prefill.gates.first_token.clear)
    written: list[int] = []
    write = StreamWriter._write

    async def noted(writer: StreamWriter, body: bytes, *, is_last: bool = False) -> None:
        written.append(len(body))
        await write(writer, body, is_last=is_last)

    monkeypatch.setattr(StreamWriter, "_write", noted)
    prompt = "one two " * 100
    body = {"model": MODEL, "prompt": prompt, "n": 16, "echo": True, "max_tokens": 2}
    url = f"{running.url}/v1/completions"
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, url, json={**body, "stream": True}, timeout=20)
        running.until(lambda: len(running.prefill.submitted) == 16)
        running.do(running.prefill.gates.first_token.set)
        text = answer.result(20).text
    assert text.count(prompt) == 16
    assert text.endswith("[DONE]\n\n")
    assert max(written) < 1024 + 2 * len(prompt), "a write and what made it long enough"


def test_what_has_gathered_behind_a_client_is_written_in_turns(
    new_gateway: Callable[..., RunningGateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = new_gateway(node_options={"step_seconds": 0.002})
    monkeypatch.setattr("gateway.turns.MAX_TOKENS_AT_ONCE", 16)
    left: list[int] = []
    take = Choice.take

    def taken(choice: Choice, max_tokens: int | None = None) -> Piece:
        piece = take(choice, max_tokens)
        left.append(choice.num_unread_tokens)
        return piece

    monkeypatch.setattr(Choice, "take", taken)
    body = {
        "model": MODEL,
        "prompt": "one two " * 60,
        "max_tokens": 100,
        "stream": True,
        "logprobs": 2,
        "n": 3,
    }
    monkeypatch.setattr("gateway.generation._reading_interval", lambda *_: 10**6)
    url = f"{running.url}/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=20) as response:
        lines = [line[6:] for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    pieces = [each for line in lines[:-1] for each in json.loads(line)["choices"]]
    for index in range(3):
        mine = [each for each in pieces if each["index"] == index]
        assert sum(len(each["logprobs"]["tokens"]) for each in mine) == 100
        assert [each["finish_reason"] for each in mine][-1] == "length"
    assert max(left) > 0, "nothing had gathered"
