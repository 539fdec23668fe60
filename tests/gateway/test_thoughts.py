"""Thoughts of a model are told from its answer, wherever the text is cut."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from gateway.thoughts import MISTRAL, TAGS, ThoughtMarks, ThoughtSplitter, thought_marks_of
from tests.gateway.model_folder import CHAT_TEMPLATE
from tests.gateway.running_gateway import client_of, client_to, gateway_of
from tests.gateway.test_http_edge import MODEL

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import httpx

# The node echoes the prompt, so that a user can write what the model is to say.
TEMPLATE = (
    "{# </think> #}{% for message in messages %}{{ message.content }}<|end|>{% endfor %}"
    "{% if opened %}<think>{% endif %}"
)
SAID = "<think>\nhm, so\n</think>\n\nHello"


def split(marks: ThoughtMarks, pieces: list[str], *, begun: bool) -> tuple[str, str]:
    splitter = ThoughtSplitter(marks, has_begun=begun)
    parts = [*(splitter.push(piece) for piece in pieces), splitter.flush()]
    return "".join(thought for thought, _ in parts), "".join(answer for _, answer in parts)


@pytest.mark.parametrize(
    ("text", "begun", "expected"),
    [
        (SAID, False, ("\nhm, so\n", "Hello")),
        ("hm</think>Hello", True, ("hm", "Hello")),
        ("\nhm</think>Hello", True, ("\nhm", "Hello")),
        (SAID, True, ("\nhm, so\n", "Hello")),
        ("</think>Hello", True, ("", "Hello")),
        ("<thi", True, ("<thi", "")),
        ("  <think>a < b</think>c", False, ("a < b", "c")),
        ("<think>cut sho", False, ("cut sho", "")),
        ("<think>cut at </thi", False, ("cut at </thi", "")),
        ("Hello <think>x</think>", False, ("", "Hello <think>x</think>")),
        ("<thing> Hello", False, ("", "<thing> Hello")),
        ("<thi", False, ("", "<thi")),
        ("<think></think> a </think>", False, ("", "a </think>")),
        ("", False, ("", "")),
    ],
)
def test_thoughts_end_at_their_mark_wherever_it_is_cut(
    text: str, begun: bool, expected: tuple[str, str]
) -> None:
    check_cuts(TAGS, text, begun, expected)


@pytest.mark.parametrize(
    ("text", "begun", "expected"),
    [
        ("[THINK]hm, [so]\n[/THINK]\nHello", False, ("hm, [so]\n", "Hello")),
        ("hm[/THINK]Hello", True, ("hm", "Hello")),
        ("[THINK]cut at [/THI", False, ("cut at [/THI", "")),
        ("[TH", False, ("", "[TH")),
        ("<think>hm</think>Hello", False, ("", "<think>hm</think>Hello")),
        ("Hello [THINK]x[/THINK]", False, ("", "Hello [THINK]x[/THINK]")),
    ],
)
def test_mistral_has_marks_of_its_own(text: str, begun: bool, expected: tuple[str, str]) -> None:
    check_cuts(MISTRAL, text, begun, expected)


def check_cuts(marks: ThoughtMarks, text: str, begun: bool, expected: tuple[str, str]) -> None:
    for at in range(len(text) + 1):
        assert split(marks, [text[:at], text[at:]], begun=begun) == expected
    assert split(marks, list(text), begun=begun) == expected


def test_a_template_tells_how_its_model_thinks() -> None:
    assert thought_marks_of(TEMPLATE) is TAGS
    assert thought_marks_of("{{ '[THINK]' + block.thinking + '[/THINK]' }}") is MISTRAL
    assert thought_marks_of(CHAT_TEMPLATE) is None
    assert TAGS.have_begun("<|assistant|>\n<think>\n")
    assert not TAGS.have_begun("<think>\n\n</think>\n\n")


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with client_of(TEMPLATE, tmp_path_factory.mktemp("thinking")) as client:
        yield client


@pytest.mark.parametrize("marks", [TAGS, MISTRAL], ids=["tags", "mistral"])
def test_marks_of_thoughts_that_are_special_tokens_are_seen(
    tmp_path: Path, marks: ThoughtMarks
) -> None:
    template = TEMPLATE.replace("<|end|>", "").replace("</think>", marks.closing)
    said = SAID.replace("<think>", marks.opening).replace("</think>", marks.closing)
    asked, url = body(messages=[{"role": "user", "content": said}]), "/v1/chat/completions"
    special = [marks.opening, marks.closing]
    with gateway_of(template, tmp_path, special=special) as running, client_to(running) as http:
        answer = http.post(url, json=asked).json()
        streamed = http.post(url, json={**asked, "stream": True}).text
    message = answer["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("\nhm, so\n", "Hello")
    deltas = [
        json.loads(line.removeprefix("data: "))["choices"][0]["delta"]
        for line in streamed.split("\n\n")
        if line.startswith("data: {")
    ]
    assert "".join(delta.get("reasoning", "") for delta in deltas) == "\nhm, so\n"
    assert "".join(delta.get("content", "") for delta in deltas) == "Hello"


def body(**changes: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": SAID}], **changes}


def test_a_chat_has_its_thoughts_beside_the_answer(http: httpx.Client) -> None:
    answer = http.post("/v1/chat/completions", json=body()).json()
    message = answer["choices"][0]["message"]
    assert message["content"] == "Hello"
    assert message["reasoning"] == message["reasoning_content"] == "\nhm, so\n"
    counts = answer["usage"]
    assert 0 < counts["completion_tokens_details"]["reasoning_tokens"] < counts["completion_tokens"]


def test_a_streamed_chat_thinks_first(http: httpx.Client) -> None:
    text = http.post("/v1/chat/completions", json=body(stream=True)).text
    assert text.count('"reasoning_content"') == text.count('"reasoning"') > 0
    assert text.rindex('"reasoning"') < text.rindex('"content"')
    assert "think>" not in text


def test_thoughts_that_the_prompt_has_opened_need_no_mark(http: httpx.Client) -> None:
    asked = body(chat_template_kwargs={"opened": True})
    asked["messages"][0]["content"] = "hm</think>Hello"
    message = http.post("/v1/chat/completions", json=asked).json()["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("hm", "Hello<think>")


def test_who_does_not_want_thoughts_gets_none(http: httpx.Client) -> None:
    chat = http.post("/v1/chat/completions", json=body(include_reasoning=False)).json()
    assert "reasoning" not in chat["choices"][0]["message"]
    assert chat["choices"][0]["message"]["content"] == "Hello"
    message = http.post("/v1/messages", json=body(max_tokens=60)).json()
    assert message["content"] == [{"type": "text", "text": "Hello"}]


def test_a_plain_completion_is_what_the_model_wrote(http: httpx.Client) -> None:
    asked = {"model": MODEL, "prompt": SAID, "max_tokens": 60, "add_special_tokens": False}
    assert http.post("/v1/completions", json=asked).json()["choices"][0]["text"] == SAID
