"""One streamed answer: bytes and their arrival times in, a filled record out.

    1. `take(data, now)` for every piece of the body; chunks with content get the time `now`.
    2. `finish()` when the body has ended: what is missing then makes the request a failure.

A chunk counts when it brings non-empty text, reasoning or part of a tool call. How many tokens
it brings is not known from it; the usage chunk at the end says how many there were in all. One that
contradicts itself, or what was asked and how the answer ended, makes the request a failure, too:
rates would be computed from it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from loadtest.record import RequestFailure, RequestRecord
from loadtest.sse import EventParser, EventTooLarge

if TYPE_CHECKING:
    from collections.abc import Callable

    from loadtest.config import Backend

try:  # several times faster; the load client's own CPU time limits what it can measure
    import orjson

    _parse: Callable[[bytes], Any] = orjson.loads
except ModuleNotFoundError:
    _parse = json.loads

_DONE = b"[DONE]"
_NONSENSE = (ValueError, LookupError, TypeError, AttributeError)  # what reading it raises


class AnswerReader:
    def __init__(
        self,
        backend: Backend,
        record: RequestRecord,
        *,
        keep_text: bool = False,
        num_asked: int | None = None,
    ) -> None:
        """`num_asked`: tokens that the answer has when it ends by `length`; None: nobody knows."""
        self._parser = EventParser()
        self._text_of = _completion_text if backend == "openai" else _chat_text
        self._record = record
        self._keep_text = keep_text
        self._pieces: list[str] = []
        self._usage: dict[str, Any] | None = None
        self._num_asked = num_asked
        self._finish_reason: str | None = None
        self._has_ended = False  # the server said so

    @property
    def text(self) -> str:
        """The answer, when it was to be kept."""
        return "".join(self._pieces)

    def take(self, data: bytes, now: float) -> None:
        try:
            for event in self._parser.feed(data):
                self._take_event(event.data, now)
        except _NONSENSE as error:
            name = "event_too_large" if isinstance(error, EventTooLarge) else "bad_event"
            self._fail(f"stream_{name}", f"{type(error).__name__}: {error}")

    def finish(self) -> None:
        record = self._record
        if not self._has_ended:
            self._fail("stream_ended_early", "the stream ended without a finish_reason or [DONE]")
        elif not record.chunk_times:
            self._fail("stream_no_content", "the stream ended without any text")
        record.num_output_tokens = len(record.chunk_times)
        try:
            if self._usage is not None:
                self._take_usage(self._usage)
        except _NONSENSE as error:
            self._fail("stream_bad_usage", f"{type(error).__name__}: {error}")

    def _take_event(self, data: bytes, now: float) -> None:
        if data == _DONE:
            self._has_ended = True
            return
        chunk = _parse(data)
        if (error := chunk.get("error")) is not None:
            self._fail_as_told(error)
            return
        if chunk.get("usage") is not None:
            self._usage = chunk["usage"]
        for choice in chunk["choices"]:
            if text := self._text_of(choice):
                self._record.chunk_times.append(now)
                if self._keep_text:
                    self._pieces.append(text)
            if choice.get("finish_reason") is not None:
                self._finish_reason = str(choice["finish_reason"])
                self._has_ended = True

    def _take_usage(self, usage: dict[str, Any]) -> None:
        record = self._record
        record.num_input_tokens = _count(usage, "prompt_tokens") or record.num_input_tokens
        if num_output := _count(usage, "completion_tokens"):
            record.num_output_tokens = num_output
            record.counted_by = "usage"
        details = usage.get("prompt_tokens_details") or {}
        record.num_cached_tokens = _count(details, "cached_tokens") or 0
        if problem := self._contradiction(usage):
            self._fail("stream_wrong_usage", problem)

    def _contradiction(self, usage: dict[str, Any]) -> str | None:
        """What cannot be true of the usage; None where all can."""
        record = self._record
        num_input, num_output = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
        total = _count(usage, "total_tokens")
        counts = (num_input, num_output, total)
        if None not in counts and (num_input or 0) + (num_output or 0) != total:
            return f"{num_input} and {num_output} tokens are said to be {total}"
        if num_input is not None and not 0 <= record.num_cached_tokens <= num_input:
            return f"{record.num_cached_tokens} tokens of a prompt of {num_input} are called cached"
        if self._num_asked is None or num_output is None:
            return None
        is_short = num_output < self._num_asked and self._finish_reason == "length"
        if num_output > self._num_asked or is_short:
            return f"ended by {self._finish_reason} with {num_output} of {self._num_asked} tokens"
        return None

    def _fail_as_told(self, error: Any) -> None:
        error_class, message = describe_error(error)
        self._fail(f"stream {error_class}", message)

    def _fail(self, error_class: str, message: str) -> None:
        if self._record.failure is None:  # the first cause; others follow from it
            self._record.failure = RequestFailure(error_class, message)


def _count(usage: dict[str, Any], name: str) -> int | None:
    number = usage.get(name)
    if number is not None and not isinstance(number, int):
        raise TypeError(f"{name} is {number!r}")
    return number


def describe_error(error: Any) -> tuple[str, str]:
    """Class and message of an `error` value in the shapes that servers send."""
    if not isinstance(error, dict):
        return "error", str(error)
    name = error.get("code") or error.get("type") or "error"
    return str(name), str(error.get("message", ""))


def _completion_text(choice: dict[str, Any]) -> str | None:
    text: str | None = choice.get("text")
    return text


def _chat_text(choice: dict[str, Any]) -> str | None:
    delta = choice.get("delta") or {}
    text: str | None = (
        delta.get("content") or delta.get("reasoning") or delta.get("reasoning_content")
    )
    if text or not delta.get("tool_calls"):
        return text
    function = delta["tool_calls"][0].get("function") or {}
    return function.get("arguments") or function.get("name")
