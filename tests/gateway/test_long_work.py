"""What one client asks for at length does not hold up the tokens of all others."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from gateway.answers import whole_answer
from gateway.choice import Choice, Piece
from gateway.tokenizer import INLINE_CHARS, Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

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
    monkeypatch.setattr("gateway.streaming.whole_answer", watched(whole_answer))
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


@pytest.mark.parametrize("num_top", [0, 20])
def test_an_answer_with_many_log_probabilities_is_written_on_a_thread(
    num_top: int, http: httpx.Client, threads: set[str]
) -> None:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Hi " * 60}],
        "max_tokens": INLINE_CHARS // 20,
        "n": 2,
        "logprobs": True,
        "top_logprobs": num_top,
    }
    answer = http.post("/v1/chat/completions", json=body).json()
    [first, second] = answer["choices"]
    assert len(first["logprobs"]["content"][0]["top_logprobs"]) == num_top
    assert len(first["logprobs"]["content"]) == len(second["logprobs"]["content"])
    assert ("tokenize" in threads) == (num_top > 0)


def test_what_has_gathered_behind_a_client_is_written_in_turns(
    new_gateway: Callable[..., RunningGateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = new_gateway(node_options={"step_seconds": 0.002})
    monkeypatch.setattr("gateway.streaming.MAX_TOKENS_AT_ONCE", 16)
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
