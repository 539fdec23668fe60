"""Rules for single fields of a request. Each raises `InvalidRequest`, which names the field."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.errors import InvalidRequest
from cluster.request import MAX_LOGPROBS
from gateway.request import MAX_SEQUENCES, StreamRules, TextRules

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.schemas import ChatBody, CompletionBody, GenerationBody
    from gateway.thoughts import ThoughtMarks
    from gateway.tools.formats import ToolFormat


MAX_STOPS = 16
MAX_STOP_CHARS = 512
MAX_SALT_CHARS = 128
_FORBIDDEN_IN_SALT = "@/\\\0"


def prompts_of(value: object) -> list[str | list[int]]:
    """One prompt or several; text or token ids."""
    if isinstance(value, str):
        return [value]
    if value is None:
        raise InvalidRequest("prompt is required.", param="prompt")
    if not isinstance(value, list) or not value:
        raise InvalidRequest("prompt must be text, token ids, or a list of these.", param="prompt")
    if type(value[0]) is int:
        return [_ids_of(value, "prompt")]
    if len(value) > MAX_SEQUENCES:
        check_num_sequences(len(value), 1)
    return [
        one if isinstance(one, str) else _ids_of(one, f"prompt[{index}]")
        for index, one in enumerate(value)
    ]


def _ids_of(value: object, path: str) -> list[int]:
    if not isinstance(value, list) or set(map(type, value)) - {int}:
        raise InvalidRequest(f"{path} must be text or a list of token ids.", param=path)
    if not value:
        raise InvalidRequest("The prompt is empty.", param=path)
    return value


def checked_n(n: int | None) -> int:
    if n is not None and not 1 <= n <= MAX_SEQUENCES:
        raise InvalidRequest(f"n must be in [1, {MAX_SEQUENCES}].", param="n")
    return n or 1


def check_num_sequences(num_prompts: int, n: int) -> None:
    if num_prompts * n > MAX_SEQUENCES:
        raise InvalidRequest(
            f"A request may ask for at most {MAX_SEQUENCES} sequences (prompts times n).",
            param="n" if n > 1 else "prompt",
        )


def chat_logprobs(body: ChatBody) -> int | None:
    if not body.logprobs:
        if body.top_logprobs:
            raise InvalidRequest("top_logprobs needs logprobs.", param="top_logprobs")
        return None
    return body.top_logprobs or 0


def completion_logprobs(body: CompletionBody) -> int | None:
    if body.logprobs is not None and not 0 <= body.logprobs <= MAX_LOGPROBS:
        raise InvalidRequest(f"logprobs must be in [0, {MAX_LOGPROBS}].", param="logprobs")
    return body.logprobs


def text_rules(
    body: GenerationBody,
    tool_format: ToolFormat | None,
    thought_marks: ThoughtMarks | None,
    prompt: str,
    is_special: Callable[[str], bool],
) -> TextRules:
    """`prompt`: of a chat, as its template wrote it. Some tokenizers have marks of calls and
    thoughts as special tokens, in which case all of these are shown."""
    marks = [] if tool_format is None else [tool_format.opening]
    marks += [] if thought_marks is None else [thought_marks.opening, thought_marks.closing]
    skips = body.skip_special_tokens
    if skips is None:
        skips = not any(map(is_special, marks))
    return TextRules(
        stops=_checked_stops(body.stop),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=skips,
        tool_format=tool_format,
        one_call=body.parallel_tool_calls is False,
        thought_marks=thought_marks,
        shows_thoughts=body.include_reasoning is not False,
        begins_thinking=thought_marks is not None and thought_marks.have_begun(prompt),
        min_tokens=body.min_tokens or 0,
    )


def _checked_stops(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise InvalidRequest("stop must be text or a list of texts.", param="stop")
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"At most {MAX_STOPS} stop strings are possible.", param="stop")
    if not all(0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise InvalidRequest(
            f"A stop string must have 1 to {MAX_STOP_CHARS} characters.", param="stop"
        )
    return tuple(stops)


def stream_rules(body: GenerationBody) -> StreamRules:
    options = body.stream_options
    if options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream.", param="stream_options")
    return StreamRules(
        is_stream=bool(body.stream),
        include_usage=options is not None and bool(options.include_usage),
        continuous_usage=options is not None
        and bool(options.include_usage)
        and bool(options.continuous_usage_stats),
    )


def checked_salt(salt: str | None) -> bytes:
    if salt is None:
        return b""
    is_clean = not any(char in _FORBIDDEN_IN_SALT for char in salt)
    if not 0 < len(salt) <= MAX_SALT_CHARS or not is_clean or not salt.isascii():
        raise InvalidRequest(
            f"cache_salt must be 1 to {MAX_SALT_CHARS} ASCII characters without @ / \\.",
            param="cache_salt",
        )
    return salt.encode()


def checked_priority(priority: int | None) -> int:
    if priority is not None and not -(2**31) <= priority < 2**31:
        raise InvalidRequest("priority is out of range.", param="priority")
    return priority or 0
