"""`POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's bodies as a chat.

A conversation that ends with the assistant's words is continued there, as Anthropic does. Blocks
`tool_use` become calls of the assistant, blocks `tool_result` messages of tools, `thinking` what
the assistant thought, of which its template takes what it wants.
"""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, WithJsonSchema

from cluster.errors import InvalidRequest, Unsupported
from gateway.dialects.claude_code import for_models
from gateway.dialects.contents import text_of
from gateway.schemas import ChatBody, Ignored, Wire, refuse, valid

if TYPE_CHECKING:
    from collections.abc import Mapping

# What would change the answer, with the values that ask for nothing.
_HARMLESS: dict[str, tuple[object, ...]] = {
    "mcp_servers": ([],),
    "container": (),
}
# Of old thoughts a chat template takes what it wants in any case.
_HARMLESS_EDIT = "clear_thinking_20251015"
MIN_THINKING_TOKENS = 1024
_CONTENT_SCHEMA = {"type": ["string", "array"]}
_SYSTEM_SCHEMA = {"type": ["string", "array", "null"]}
_TEXTS = frozenset({"text"})
_NO_WORDS = frozenset({"thinking", "redacted_thinking", "tool_use", "tool_result"})
Json = dict[str, Any]


class MessageOfConversation(Wire):
    role: Literal["user", "assistant", "system"]
    content: Annotated[Any, WithJsonSchema(_CONTENT_SCHEMA)]


class Tool(Wire):
    type: str | None = None
    name: str
    description: str | None = None
    input_schema: Json | None = None


class ToolChoice(Wire):
    type: str
    disable_parallel_tool_use: bool | None = None


class ToolUse(Wire):
    type: Literal["tool_use"]
    id: str
    name: str
    input: Json


class ThinkingBlock(Wire):
    type: Literal["thinking"]
    thinking: str


class ToolResult(Wire):
    type: Literal["tool_result"]
    tool_use_id: str
    content: Any = None


class Thinking(Wire):
    """`budget_tokens` is checked, and not enforced: nothing here ends thoughts."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: int | None = None
    display: str | None = None


class OutputConfig(Wire):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: Any = None


class Edit(Wire):
    type: str


class ContextManagement(Wire):
    edits: list[Edit] | None = None


class CountTokensBody(Wire):
    """`POST /v1/messages/count_tokens`."""

    model: str | None = None
    messages: list[MessageOfConversation] = Field(min_length=1)
    system: Annotated[Any, WithJsonSchema(_SYSTEM_SCHEMA)] = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    context_management: ContextManagement | None = None


class MessagesBody(CountTokensBody):
    """`POST /v1/messages`."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stream: bool | None = None
    metadata: Ignored = None
    service_tier: Ignored = None


def parse_messages(fields: Mapping[str, Any]) -> ChatBody:
    refuse(fields, _HARMLESS)
    body = valid(MessagesBody, fields)
    _check_budget(body)
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
    return _as_chat(valid(CountTokensBody, fields), {})


def _check_budget(body: MessagesBody) -> None:
    if body.thinking is None or body.thinking.type != "enabled":
        return
    budget = body.thinking.budget_tokens or 0
    if not MIN_THINKING_TOKENS <= budget < body.max_tokens:
        raise InvalidRequest(
            f"thinking.budget_tokens must be at least {MIN_THINKING_TOKENS} and less than "
            "max_tokens.",
            param="thinking.budget_tokens",
        )


def _as_chat(body: CountTokensBody, sampling: Json) -> ChatBody:
    _refuse_parts(body)
    thinking = body.thinking or Thinking(type="disabled")
    thinks = thinking.type != "disabled"
    messages = _system([] if body.system is None else body.system, "system")
    for index, one in enumerate(body.messages):
        read = _system if one.role == "system" else partial(_messages, one.role)
        messages += read(one.content, f"messages[{index}].content")
    if not messages:
        raise InvalidRequest("messages must not be empty.", param="messages")
    tools = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(body.tools or [])]
    return ChatBody.model_validate(
        {
            "model": body.model,
            "messages": messages,
            "continue_final_message": body.messages[-1].role == "assistant",
            "tools": tools or None,
            "tool_choice": _choice(body.tool_choice),
            # Who does not ask for thoughts wants none, not to wait for them.
            "chat_template_kwargs": {"enable_thinking": thinks},
            "include_reasoning": thinks and thinking.display != "omitted",
            "reasoning_effort": body.output_config.effort if body.output_config else None,
            "parallel_tool_calls": not (
                body.tool_choice and body.tool_choice.disable_parallel_tool_use
            ),
            **sampling,
        }
    )


def _refuse_parts(body: CountTokensBody) -> None:
    if body.output_config is not None and body.output_config.format is not None:
        raise Unsupported(
            "output_config.format is not supported here; leave it out.",
            param="output_config.format",
        )
    for edit in (body.context_management and body.context_management.edits) or ():
        if edit.type != _HARMLESS_EDIT:
            raise Unsupported(
                f"Of context_management only {_HARMLESS_EDIT} is supported here.",
                param="context_management.edits",
            )


def _system(content: object, path: str) -> list[Json]:
    text = _text(for_models(content), path)
    return [{"role": "system", "content": text}] if text else []


def _messages(role: str, content: object, path: str) -> list[Json]:
    """Results of tools come before the words of the same turn."""
    blocks = content if isinstance(content, list) else []
    placed = [(block, f"{path}[{index}]") for index, block in enumerate(blocks)]
    uses = [valid(ToolUse, block, at) for block, at in placed if _is(block, "tool_use")]
    results = [
        (valid(ToolResult, block, at), at) for block, at in placed if _is(block, "tool_result")
    ]
    words: Json = {"role": role, "content": _text(content, path)}
    if uses:
        words["tool_calls"] = [_call(use) for use in uses]
    thoughts = [valid(ThinkingBlock, block, at) for block, at in placed if _is(block, "thinking")]
    if thoughts:
        words["reasoning_content"] = "\n".join(thought.thinking for thought in thoughts)
    told = [
        {
            "role": "tool",
            "tool_call_id": result.tool_use_id,
            "content": _text([] if result.content is None else result.content, f"{at}.content"),
        }
        for result, at in results
    ]
    return told + ([words] if words["content"] or uses or not results else [])


def _is(block: object, kind: str) -> bool:
    return isinstance(block, dict) and block.get("type") == kind


def _call(use: ToolUse) -> Json:
    function = {"name": use.name, "arguments": json.dumps(use.input, ensure_ascii=False)}
    return {"id": use.id, "type": "function", "function": function}


def _tool(tool: Tool, path: str) -> Json:
    if tool.type not in (None, "custom"):
        raise Unsupported("Only tools of the client are supported.", param=f"{path}.type")
    schema = {"type": "object", **(tool.input_schema or {})}
    function: Json = {"name": tool.name, "parameters": schema}
    if tool.description is not None:
        function["description"] = tool.description
    return {"type": "function", "function": function}


def _choice(choice: ToolChoice | None) -> str | None:
    return None if choice is None else choice.type


def _text(content: object, path: str) -> str:
    return text_of(content, path, texts=_TEXTS, skipped=_NO_WORDS)
