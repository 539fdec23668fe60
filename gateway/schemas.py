"""The JSON of requests, as clients may write it. Types only; meaning is `validation.py`'s.

Strict: "0.7" is not a number, 1.0 not a count, true not 1. Unknown fields are ignored, null is
the same as leaving a field out. Fields that would change the answer and are not served are refused
by name (`refuse_unsupported`, `refuse`), never silently dropped. Those that change nothing of an
answer are declared here as what they are: taken, and ignored.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from cluster.errors import InvalidRequest, Unsupported

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MAX_PROBLEMS = 10
MAX_INPUT_CHARS = 200
_SAYS_WHAT_IT_GOT = frozenset({"missing", "too_short", "too_long"})

_TOOLS = ("tools", "tool_choice")  # of chats alone
_ECHO = ("echo",)  # of plain completions alone; vLLM has it for chats, too
# What these fields ask for would change the answer, and is not built.
_UNSUPPORTED = (
    "functions",
    "function_call",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "json_schema",
    "regex",
    "ebnf",
    "allowed_token_ids",
    "stop_regex",
    "custom_logit_processor",
    "lora_path",
    "prompt_logprobs",
    "truncate_prompt_tokens",
    "thinking_token_budget",
    "chat_template",
    "kv_transfer_params",
    "use_beam_search",
    "suffix",
    "documents",
    "audio",
    "web_search_options",
)
# The same of fields that have values which ask for nothing: these.
_HARMLESS: dict[str, tuple[object, ...]] = {
    "store": (False,),
    "verbosity": ("medium",),
    "modalities": ([], ["text"]),
    "bad_words": ([],),
    "logits_processors": ([],),
}
# Of one that may be sent and says nothing to this server.
Ignored = Annotated[Any, Field(description="Taken, and ignored: the answer is the same.")]

_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
        {"type": "null"},
    ]
}
_CONTENT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                "required": ["type", "text"],
            },
        },
        {"type": "null"},
    ]
}


class Wire(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


W = TypeVar("W", bound=Wire)


class StreamOptions(Wire):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ResponseFormat(Wire):
    type: str


class GenerationBody(Wire):
    """What chat and plain completions have in common."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: Annotated[Any, WithJsonSchema({"type": ["string", "array", "null"]})] = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: Ignored = None
    service_tier: Ignored = None
    prompt_cache_key: Ignored = None  # equal beginnings are found by their content
    safety_identifier: Ignored = None
    # Extensions, with vLLM's names.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    add_special_tokens: bool | None = None
    cache_salt: str | None = None
    priority: int | None = None
    return_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
    parallel_tool_calls: bool | None = None  # of chats with tools
    include_reasoning: bool | None = None


class CompletionBody(GenerationBody):
    """`POST /v1/completions`."""

    prompt: Annotated[Any, WithJsonSchema(_PROMPT_SCHEMA)] = None
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None


class MessageBody(Wire):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[Any, WithJsonSchema(_CONTENT_SCHEMA)] = None
    name: str | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`."""

    messages: list[MessageBody] = Field(min_length=1)
    tools: list[Any] | None = None
    tool_choice: Annotated[Any, WithJsonSchema({"type": ["string", "null"]})] = None
    max_completion_tokens: int | None = None
    prediction: Ignored = None  # it would make the answer sooner, not another
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )


class TokenizeBody(Wire):
    """`POST /tokenize`: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[MessageBody] | None = None
    tools: list[Any] | None = None
    tool_choice: Annotated[Any, WithJsonSchema({"type": ["string", "null"]})] = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Wire):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[int]


def parse_chat(fields: Mapping[str, Any]) -> ChatBody:
    refuse_unsupported(fields, (*_ECHO, *_UNSUPPORTED))
    refuse(fields, _HARMLESS)
    return valid(ChatBody, fields)


def parse_completion(fields: Mapping[str, Any]) -> CompletionBody:
    refuse_unsupported(fields, (*_TOOLS, *_UNSUPPORTED))
    refuse(fields, _HARMLESS)
    return valid(CompletionBody, fields)


def parse_tokenize(fields: Mapping[str, Any]) -> TokenizeBody:
    refuse_unsupported(fields)
    return valid(TokenizeBody, fields)


def parse_detokenize(fields: Mapping[str, Any]) -> DetokenizeBody:
    return valid(DetokenizeBody, fields)


def valid(kind: type[W], fields: object, path: str = "") -> W:
    """`fields` as a `kind`; `path` says where they stand in the body. Raises `InvalidRequest`."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise invalid(error, path) from error


def refuse_unsupported(fields: Mapping[str, Any], names: Sequence[str] = _UNSUPPORTED) -> None:
    for name in names:
        if not is_off(fields.get(name)):
            raise Unsupported(f"{name} is not supported here; leave it out.", param=name)


def is_off(value: object) -> bool:
    """Left out, null or false. 0 is a number, and may ask for something."""
    return value is None or value is False


def refuse(fields: Mapping[str, object], harmless: Mapping[str, tuple[object, ...]]) -> None:
    """Fields that would change the answer. `harmless[name]` are the values that ask for nothing."""
    for name, values in harmless.items():
        given = fields.get(name)
        if given is not None and not any(_is_same(given, value) for value in values):
            allowed = "".join(f", or send {json.dumps(value)}" for value in values if value != [])
            raise Unsupported(f"{name} is not supported here; leave it out{allowed}.", param=name)


def _is_same(given: object, value: object) -> bool:
    """As JSON: there 0 is not false."""
    return type(given) is type(value) and given == value


def invalid(error: ValidationError, path: str = "") -> InvalidRequest:
    """Pydantic's findings in one message, bounded; `param` is the path of the first."""
    problems = error.errors(include_url=False, include_context=False)
    for problem in problems:
        problem["loc"] = (path, *problem["loc"]) if path else problem["loc"]
    lines = [_problem(problem) for problem in problems[:MAX_PROBLEMS]]
    if len(problems) > MAX_PROBLEMS:
        lines.append(f"and {len(problems) - MAX_PROBLEMS} more")
    return InvalidRequest("; ".join(lines) + ".", param=field_path(problems[0]["loc"]))


def _problem(problem: Any) -> str:
    given = "" if problem["type"] in _SAYS_WHAT_IT_GOT else repr(problem["input"])[:MAX_INPUT_CHARS]
    text = str(problem["msg"]).replace(" after validation", "")
    text = text[0].lower() + text[1:]
    return f"{field_path(problem['loc'])}: {text}" + (f", not {given}" if given else "")


def field_path(location: tuple[int | str, ...]) -> str:
    """("messages", 0, "role") as "messages[0].role". A client may name a field, at any length."""
    path = ""
    for step in location:
        name = str(step)[:MAX_INPUT_CHARS]
        path += f"[{name}]" if isinstance(step, int) else f".{name}" if path else name
    return path
