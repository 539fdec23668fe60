"""`POST /v1/responses`: its body as a chat.

Nothing is stored, so each request brings all of its input: messages, calls and their outputs, and
thoughts, which belong to what the assistant says next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import WithJsonSchema

from cluster.errors import InvalidRequest, Unsupported
from gateway.dialects.contents import text_of
from gateway.schemas import ChatBody, Ignored, Wire, refuse, valid

if TYPE_CHECKING:
    from collections.abc import Mapping

# What would change the answer, with the values that ask for nothing.
_HARMLESS: dict[str, tuple[object, ...]] = {
    "previous_response_id": (),
    "conversation": (),
    "prompt": (),
    "background": (False,),
    "store": (False,),
    "include": ([], ["reasoning.encrypted_content"]),  # there is none: thoughts are plain
    "truncation": ("disabled",),
    "top_logprobs": (0,),
}
_TEXTS = frozenset({"input_text", "output_text", "text"})
_THOUGHTS = frozenset({"reasoning_text"})
_ROLES = ("system", "developer", "user", "assistant")
# As the client wrote it.
_REPEATED = (
    "instructions",
    "max_output_tokens",
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "temperature",
    "tool_choice",
    "top_p",
    "user",
)
Json = dict[str, Any]


class Reasoning(Wire):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


class TextFormat(Wire):
    type: str


class TextOptions(Wire):
    verbosity: Literal["low", "medium", "high"] | None = None
    format: TextFormat | None = None


class Tool(Wire):
    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionCall(Wire):
    """A call of an earlier turn, as it was answered."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class FunctionCallOutput(Wire):
    type: Literal["function_call_output"]
    call_id: str
    output: Any


class ReasoningItem(Wire):
    type: Literal["reasoning"]
    content: Any = None


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
    tools: list[Tool] | None = None
    tool_choice: Annotated[Any, WithJsonSchema({"type": ["string", "null"]})] = None
    parallel_tool_calls: bool | None = None
    user: Ignored = None
    metadata: Ignored = None
    service_tier: Ignored = None
    prompt_cache_key: Ignored = None
    safety_identifier: Ignored = None


def parse_responses(fields: Mapping[str, Any]) -> ChatBody:
    refuse(fields, _HARMLESS)
    body = valid(ResponsesBody, fields)
    if body.text is not None and body.text.format is not None and body.text.format.type != "text":
        raise Unsupported("Only text.format text is supported.", param="text.format.type")
    if body.text is not None and body.text.verbosity not in (None, "medium"):
        raise Unsupported("Only text.verbosity medium is supported.", param="text.verbosity")
    return _as_chat(body)


def _as_chat(body: ResponsesBody) -> ChatBody:
    messages = _messages(body.input)
    if body.instructions:
        messages.insert(0, {"role": "system", "content": body.instructions})
    tools = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(body.tools or [])]
    return ChatBody.model_validate(
        {
            "model": body.model,
            "messages": messages,
            "max_completion_tokens": body.max_output_tokens,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "stream": body.stream,
            "reasoning_effort": body.reasoning.effort if body.reasoning else None,
            "tools": tools or None,
            "tool_choice": body.tool_choice if tools else None,
            "parallel_tool_calls": body.parallel_tool_calls,
        }
    )


def repeated(fields: Mapping[str, Any]) -> Json:
    """What an answer says again of a request that is valid, and what it stands for where that said
    nothing."""
    tools = [Tool.model_validate(tool).model_dump() for tool in fields.get("tools") or []]
    said: Json = {
        "background": False,
        "frequency_penalty": 0.0,
        "instructions": None,
        "max_output_tokens": None,
        "max_tool_calls": None,
        "metadata": {},
        "parallel_tool_calls": True,
        "presence_penalty": 0.0,
        "previous_response_id": None,
        "prompt_cache_key": None,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": None,
        "service_tier": "default",
        "store": False,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "tool_choice": "auto",
        "top_logprobs": 0,
        "top_p": 1.0,
        "truncation": "disabled",
        "user": None,
    }
    said |= {name: fields[name] for name in _REPEATED if fields.get(name) is not None}
    said["reasoning"]["effort"] = (fields.get("reasoning") or {}).get("effort")
    return {**said, "tools": tools}


def _tool(tool: Tool, path: str) -> Json:
    """As a chat describes it. What is wrong with it is said there."""
    if tool.type != "function" or tool.name is None:
        raise Unsupported("Only named functions are supported.", param=f"{path}.type")
    function = tool.model_dump(exclude={"type"}, exclude_none=True)
    return {"type": "function", "function": function}


def _messages(given: object) -> list[Json]:
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages = _listed(given) if isinstance(given, list) else []
    if not messages:
        raise InvalidRequest("input must be text or a list of messages.", param="input")
    return messages


def _listed(given: list[object]) -> list[Json]:
    messages: list[Json] = []
    thought = ""
    for index, item in enumerate(given):
        path = f"input[{index}]"
        if isinstance(item, dict) and item.get("type") == "reasoning":
            thought = _thought(valid(ReasoningItem, item, path), path)
            continue
        message = _message(item, path)
        if thought and message["role"] == "assistant":
            message["reasoning_content"] = thought
        if _continues(message, messages):
            calls = messages[-1].setdefault("tool_calls", [])
            calls += message["tool_calls"]
        else:
            messages.append(message)
        thought = ""
    return messages


def _continues(message: Json, before: list[Json]) -> bool:
    """A call of the same turn of the assistant."""
    is_call = "tool_calls" in message and "reasoning_content" not in message
    return is_call and bool(before) and before[-1]["role"] == "assistant"


def _thought(item: ReasoningItem, path: str) -> str:
    """OpenAI's own are encrypted, and say nothing here."""
    return text_of(item.content or [], f"{path}.content", texts=_THOUGHTS)


def _message(item: object, path: str) -> Json:
    if not isinstance(item, dict):
        raise InvalidRequest(f"{path} must be an object.", param=path)
    kind = item.get("type", "message")
    if kind == "function_call":
        return _call(valid(FunctionCall, item, path))
    if kind == "function_call_output":
        given = valid(FunctionCallOutput, item, path)
        output = text_of(given.output, f"{path}.output", texts=_TEXTS)
        return {"role": "tool", "tool_call_id": given.call_id, "content": output}
    if kind != "message":
        raise Unsupported("Only messages and calls are supported here.", param=f"{path}.type")
    role = item.get("role")
    if role not in _ROLES:
        raise InvalidRequest(
            f"{path}.role must be one of {', '.join(_ROLES)}.", param=f"{path}.role"
        )
    return {"role": role, "content": text_of(item.get("content"), f"{path}.content", texts=_TEXTS)}


def _call(call: FunctionCall) -> Json:
    function = {"name": call.name, "arguments": call.arguments}
    one = {"id": call.call_id, "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [one]}
