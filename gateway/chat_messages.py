"""Chat messages as clients write them, made plain for the template: a role and a text.

Content may be a text or a list of text parts, which are joined by line breaks. Other parts are
refused by name: this cluster serves text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cluster.errors import InvalidRequest, Unsupported
from gateway.tools.bodies import earlier_calls

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.chat_template import Message
    from gateway.schemas import ChatBody, MessageBody, TokenizeBody

MAX_MESSAGES = 4096
MAX_TEMPLATE_VARIABLES = 16
_MESSAGE_CHARS = 50  # what a message costs to render besides its text
_TOOL_CHARS = 10_000  # a tool, or a call of one: it may be of any length
_TEXTS = ("content", "reasoning_content")
_RESERVED_VARIABLES = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
)


def plain_messages(messages: Sequence[MessageBody]) -> list[Message]:
    if not messages:
        raise InvalidRequest("messages must not be empty.", param="messages")
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequest(f"At most {MAX_MESSAGES} messages are possible.", param="messages")
    plain = [_plain(message, f"messages[{index}]") for index, message in enumerate(messages)]
    _name_results(plain)
    return plain


def num_chars(messages: Sequence[Message], tools: Sequence[object]) -> int:
    """About how many a template has to write, of plain messages."""
    num_tools = len(tools) + sum(len(message.get("tool_calls", ())) for message in messages)
    texts = (message[key] for message in messages for key in _TEXTS if key in message)
    return len(messages) * _MESSAGE_CHARS + num_tools * _TOOL_CHARS + sum(map(len, texts))


def _name_results(messages: list[Message]) -> None:
    """Some templates want to know of a result which tool gave it; clients say which call did."""
    names: dict[str, str] = {}
    for message in messages:
        names |= {call["id"]: call["function"]["name"] for call in message.get("tool_calls", ())}
        if message["role"] == "tool" and "name" not in message:
            message["name"] = names.get(message.get("tool_call_id", ""), "")


def _plain(message: MessageBody, path: str) -> Message:
    if message.role == "function":
        raise Unsupported("Messages of functions are not supported; use tool.", param=path)
    plain: Message = {"role": message.role, "content": _text_of(message, f"{path}.content")}
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        plain["tool_calls"] = earlier_calls(message, path)
    reasoning = message.reasoning_content or message.reasoning
    if reasoning is not None:
        plain["reasoning_content"] = reasoning
    return plain


def _text_of(message: MessageBody, path: str) -> str:
    content = message.content
    if isinstance(content, str):
        return content
    if content is None and message.role == "assistant":
        return ""
    if not isinstance(content, list):
        raise InvalidRequest(f"{path} must be text or a list of text parts.", param=path)
    parts = [_part_text(part, f"{path}[{index}]") for index, part in enumerate(content)]
    return "\n".join(parts)


def _part_text(part: object, path: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str):
        raise InvalidRequest(f"{path} must be an object with a type.", param=path)
    if kind != "text":
        raise Unsupported("Only text content is supported.", param=f"{path}.type")
    text = part.get("text")
    if not isinstance(text, str):
        raise InvalidRequest(f"{path}.text must be text.", param=f"{path}.text")
    return text


def template_variables(body: ChatBody | TokenizeBody) -> dict[str, Any]:
    """What a client may set for the template: plain values under names that are not ours."""
    variables: dict[str, Any] = {}
    effort = getattr(body, "reasoning_effort", None)
    if effort is not None:
        variables["reasoning_effort"] = effort
    if effort == "none":
        variables["enable_thinking"] = False  # the other word that templates have for it
    given = body.chat_template_kwargs or {}
    if len(given) > MAX_TEMPLATE_VARIABLES:
        raise InvalidRequest("Too many chat_template_kwargs.", param="chat_template_kwargs")
    for name, value in given.items():
        path = f"chat_template_kwargs.{name[:64]}"
        if name in _RESERVED_VARIABLES or not name.isidentifier() or name.endswith("_token"):
            raise InvalidRequest("This name cannot be set.", param=path)
        if value is not None and not isinstance(value, (bool, int, float, str)):
            raise InvalidRequest("Only plain values can be set.", param=path)
        variables[name] = value
    return variables
