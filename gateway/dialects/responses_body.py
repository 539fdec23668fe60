"""`POST /v1/responses`: its body as a chat.

Nothing is stored, so each request brings all of its input. Text in, text out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ValidationError, WithJsonSchema

from cluster.errors import InvalidRequest, Unsupported
from gateway.dialects.contents import refuse, text_of
from gateway.schemas import ChatBody, Wire, invalid

if TYPE_CHECKING:
    from collections.abc import Mapping

_HARMLESS: dict[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ("auto", "none"),
    "previous_response_id": (),
    "conversation": (),
    "prompt": (),
    "background": (False,),
    "store": (False,),
    "include": ([],),
    "truncation": ("disabled",),
    "top_logprobs": (0,),
}
_TEXTS = frozenset({"input_text", "output_text", "text"})
_ROLES = ("system", "developer", "user", "assistant")


class Reasoning(Wire):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


class TextFormat(Wire):
    type: str


class TextOptions(Wire):
    format: TextFormat | None = None


class ResponsesBody(Wire):
    """`POST /v1/responses`."""

    model: str | None = None
    input: Annotated[Any, WithJsonSchema({"type": ["string", "array"]})]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None


def parse_responses(fields: Mapping[str, Any]) -> ChatBody:
    refuse(fields, _HARMLESS)
    try:
        body = ResponsesBody.model_validate(fields)
    except ValidationError as error:
        raise invalid(error) from error
    if body.text is not None and body.text.format is not None and body.text.format.type != "text":
        raise Unsupported("Only text.format text is supported.", param="text.format.type")
    return _as_chat(body)


def _as_chat(body: ResponsesBody) -> ChatBody:
    messages = _messages(body.input)
    if body.instructions is not None:
        messages.insert(0, {"role": "system", "content": body.instructions})
    return ChatBody.model_validate(
        {
            "model": body.model,
            "messages": messages,
            "max_completion_tokens": body.max_output_tokens,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "stream": body.stream,
            "reasoning_effort": body.reasoning.effort if body.reasoning else None,
        }
    )


def _messages(given: object) -> list[dict[str, str]]:
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise InvalidRequest("input must be text or a list of messages.", param="input")
    return [_message(item, f"input[{index}]") for index, item in enumerate(given)]


def _message(item: object, path: str) -> dict[str, str]:
    if not isinstance(item, dict):
        raise InvalidRequest(f"{path} must be an object.", param=path)
    if item.get("type", "message") != "message":
        raise Unsupported("Only messages are supported as input.", param=f"{path}.type")
    role = item.get("role")
    if role not in _ROLES:
        raise InvalidRequest(
            f"{path}.role must be one of {', '.join(_ROLES)}.", param=f"{path}.role"
        )
    return {"role": role, "content": text_of(item.get("content"), f"{path}.content", texts=_TEXTS)}
