from __future__ import annotations

from typing import Any

import pytest

from loadtest.answer import AnswerReader
from loadtest.record import RequestRecord


def read(
    wire: Any, *pieces: bytes, backend: Any = "openai", num_asked: int | None = None
) -> RequestRecord:
    """Pieces arrive at seconds 1, 2, 3 ..."""
    record = RequestRecord(index=0, planned=0.0)
    reader = AnswerReader(backend, record, num_asked=num_asked)
    for second, piece in enumerate(pieces, start=1):
        reader.take(piece, float(second))
    reader.finish()
    return record


def test_only_chunks_with_content_are_timed(wire: Any) -> None:
    record = read(
        wire,
        wire.text_chunk(""),
        wire.text_chunk("a"),
        b": keep-alive\n\n",
        wire.text_chunk("b"),
        wire.text_chunk("", "stop") + wire.usage_chunk(7, 2, cached_tokens=4) + wire.done,
    )
    assert record.chunk_times == [2.0, 4.0]
    assert record.failure is None
    assert (record.num_input_tokens, record.num_output_tokens) == (7, 2)
    assert record.num_cached_tokens == 4
    assert record.counted_by == "usage"


def test_usage_counts_tokens_when_a_chunk_brings_several(wire: Any) -> None:
    record = read(wire, wire.text_chunk("abc"), wire.usage_chunk(1, 6) + wire.done)
    assert len(record.chunk_times) == 1
    assert record.num_output_tokens == 6


@pytest.mark.parametrize(
    ("ending", "usage", "problem"),
    [
        ("length", (7, 4, 11, 7), None),
        ("stop", (7, 3, 10, 0), None),
        ("length", (7, 4, 12, 0), "7 and 4 tokens are said to be 12"),
        ("length", (7, 4, 11, 8), "8 tokens of a prompt of 7 are called cached"),
        ("length", (7, 3, 10, 0), "ended by length with 3 of 4 tokens"),
        ("stop", (7, 5, 12, 0), "ended by stop with 5 of 4 tokens"),
    ],
)
def test_a_usage_that_cannot_be_true_fails_the_request(
    ending: str, usage: tuple[int, ...], problem: str | None, wire: Any
) -> None:
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    told: dict[str, Any] = dict(zip(names, usage, strict=False))
    told["prompt_tokens_details"] = {"cached_tokens": usage[3]}
    last = wire.event({"choices": [], "usage": told})
    record = read(wire, wire.text_chunk("a"), wire.text_chunk("b", ending), last, num_asked=4)
    assert (record.failure and record.failure.message) == problem


@pytest.mark.parametrize("usage", [[7], {"prompt_tokens": "7"}, {"prompt_tokens_details": [7]}])
def test_a_usage_that_cannot_be_read_fails_the_request_alone(usage: Any, wire: Any) -> None:
    last = wire.event({"choices": [], "usage": usage})
    record = read(wire, wire.text_chunk("abc", "stop") + last + wire.done)
    assert record.failure is not None
    assert record.failure.error_class == "stream_bad_usage"


def test_running_usage_in_every_chunk_leaves_the_last_as_the_count(wire: Any) -> None:
    def chunk(count: int) -> Any:
        usage = {"prompt_tokens": 3, "completion_tokens": count}
        return wire.event({"choices": [{"text": "a"}], "usage": usage})

    record = read(wire, chunk(1), chunk(2), chunk(3), wire.done)
    assert record.num_output_tokens == 3


def test_without_usage_chunks_are_counted_and_the_record_says_so(wire: Any) -> None:
    record = read(wire, wire.text_chunk("a"), wire.text_chunk("b"), wire.done)
    assert record.num_output_tokens == 2
    assert record.counted_by == "chunks"


@pytest.mark.parametrize(
    "delta",
    [
        {"content": "a"},
        {"content": None, "reasoning": "a"},
        {"reasoning_content": "a"},
        {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]},
    ],
)
def test_chat_text_reasoning_and_tool_calls_count_as_content(
    wire: Any, delta: dict[str, Any]
) -> None:
    def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> Any:
        return wire.event({"choices": [{"delta": delta, "finish_reason": finish_reason}]})

    role = chunk({"role": "assistant", "content": ""})
    record = read(wire, role, chunk(delta), chunk({}, "stop"), wire.done, backend="openai-chat")
    assert record.chunk_times == [2.0]
    assert record.failure is None


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ({"message": "gone", "type": "server_error", "code": "node_lost"}, "stream node_lost"),
        ({"message": "gone", "type": "server_error", "code": None}, "stream server_error"),
        ("gone", "stream error"),
    ],
)
def test_an_error_event_fails_the_request_with_its_class(
    wire: Any, error: Any, expected: str
) -> None:
    record = read(wire, wire.text_chunk("a"), wire.event({"error": error}), wire.done)
    assert record.failure is not None
    assert record.failure.error_class == expected
    assert record.failure.message == "gone"


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([b'data: {"choices":[{"text":"a"}]}\n\n'], "stream_ended_early"),
        ([b"data: [DONE]\n\n"], "stream_no_content"),
        ([b"data: {broken\n\n"], "stream_bad_event"),
        ([b"data: [1]\n\n"], "stream_bad_event"),
        ([b'data: {"object":"x"}\n\n'], "stream_bad_event"),
    ],
)
def test_a_broken_stream_is_never_a_success(wire: Any, pieces: list[bytes], expected: str) -> None:
    record = read(wire, *pieces)
    assert record.failure is not None
    assert record.failure.error_class == expected


def test_a_finish_reason_ends_a_stream_whose_server_sends_no_done(wire: Any) -> None:
    assert read(wire, wire.text_chunk("a", "length")).failure is None
