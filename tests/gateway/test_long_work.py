"""What one client asks for at length does not hold up the tokens of all others."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest

from gateway.answers import whole_answer
from gateway.tokenizer import INLINE_CHARS, Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

    import httpx

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
