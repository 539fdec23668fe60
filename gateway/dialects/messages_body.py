"""`POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's bodies as a chat. Text alone.

A conversation that ends with the assistant's words is continued there, as Anthropic does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError, WithJsonSchema

from gateway.dialects.contents import refuse, text_of
from gateway.schemas import ChatBody, Wire, invalid

if TYPE_CHECKING:
    from collections.abc import Mapping

_HARMLESS: dict[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ({"type": "none"},),
    "thinking": ({"type": "disabled"},),
    "output_config": ({},),
    "mcp_servers": ([],),
    "container": (),
    "context_management": (),
}
_CONTENT_SCHEMA = {"type": ["string", "array"]}
_TEXTS = frozenset({"text"})
_THOUGHTS = frozenset({"thinking", "redacted_thinking"})


class MessageOfConversation(Wire):
    role: Literal["user", "assistant", "system"]
    content: Annotated[Any, WithJsonSchema(_CONTENT_SCHEMA)]


class CountTokensBody(Wire):
    """`POST /v1/messages/count_tokens`."""

    model: str | None = None
    messages: list[MessageOfConversation] = Field(min_length=1)
    system: Annotated[Any, WithJsonSchema(_CONTENT_SCHEMA)] = None


class MessagesBody(CountTokensBody):
    """`POST /v1/messages`."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stream: bool | None = None


def parse_messages(fields: Mapping[str, Any]) -> ChatBody:
    refuse(fields, _HARMLESS)
    try:
        body = MessagesBody.model_validate(fields)
    except ValidationError as error:
        raise invalid(error) from error
    sampling = {
        "max_tokens": body.max_tokens,
        "stop": body.stop_sequences,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "stream": body.stream,
    }
    return _as_chat(body, sampling)


def parse_count_tokens(fields: Mapping[str, Any]) -> ChatBody:
    refuse(fields, _HARMLESS)
    try:
        body = CountTokensBody.model_validate(fields)
    except ValidationError as error:
        raise invalid(error) from error
    return _as_chat(body, {})


def _as_chat(body: CountTokensBody, sampling: dict[str, Any]) -> ChatBody:
    messages = [
        {"role": one.role, "content": _text(one.content, f"messages[{index}].content")}
        for index, one in enumerate(body.messages)
    ]
    if body.system is not None:
        messages.insert(0, {"role": "system", "content": _text(body.system, "system")})
    return ChatBody.model_validate(
        {
            "model": body.model,
            "messages": messages,
            "continue_final_message": body.messages[-1].role == "assistant",
            **sampling,
        }
    )


def _text(content: object, path: str) -> str:
    return text_of(content, path, texts=_TEXTS, skipped=_THOUGHTS)
