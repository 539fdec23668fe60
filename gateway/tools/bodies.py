"""What clients write about tools, checked: descriptions, the choice, calls of earlier turns."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from cluster.errors import InvalidRequest, Unsupported
from gateway.body import MAX_DEPTH, depth_of
from gateway.schemas import is_off

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.schemas import MessageBody

MAX_TOOLS = 1024  # an agent with a few servers of tools has hundreds
# A client may leave these out; Hermes' template writes them without asking.
_UNSAID = {"description": "", "parameters": {"type": "object", "properties": {}}}


def offered_tools(tools: Sequence[Any] | None, choice: object) -> list[dict[str, Any]]:
    """Those that the model is told of: none unless it may call them."""
    if tools is None:
        if choice not in (None, "none"):
            raise InvalidRequest("tool_choice needs tools.", param="tool_choice")
        return []
    if not 1 <= len(tools) <= MAX_TOOLS:
        raise InvalidRequest(f"tools must hold 1 to {MAX_TOOLS} tools.", param="tools")
    if choice not in (None, "auto", "none"):
        raise Unsupported(
            "tool_choice may be auto or none: nothing here makes a model call.", param="tool_choice"
        )
    checked = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]
    return [] if choice == "none" else checked


def _tool(tool: object, path: str) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(tool, dict) or tool.get("type") != "function":
        raise Unsupported(f"{path}.type must be function.", param=f"{path}.type")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidRequest(f"{path}.function must have a name.", param=f"{path}.function.name")
    if not is_off(function.get("strict")):
        raise Unsupported(
            "strict is not supported here; leave it out.", param=f"{path}.function.strict"
        )
    given = {name: value for name, value in function.items() if value is not None}
    missing = {name: value for name, value in _UNSAID.items() if name not in given}
    return {"type": "function", "function": given | missing}


def earlier_calls(message: MessageBody, path: str) -> list[dict[str, Any]]:
    """Calls as templates take them: their arguments are an object, not its text."""
    return [
        _earlier_call(call, f"{path}.tool_calls[{index}]")
        for index, call in enumerate(message.tool_calls or [])
    ]


def _earlier_call(call: object, path: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict):
        raise InvalidRequest(f"{path} must be a call of a function.", param=path)
    try:
        arguments = json.loads(function.get("arguments") or "{}")
        if isinstance(arguments, dict | list) and depth_of(arguments) > MAX_DEPTH:
            raise ValueError("too deep for a template")
        json.dumps(arguments, ensure_ascii=False).encode()  # half a character has no bytes
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidRequest(
            f"{path}.function.arguments must be JSON.", param=f"{path}.function.arguments"
        ) from error
    called = {"name": str(function.get("name")), "arguments": arguments}
    return {"id": str(call.get("id")), "type": "function", "function": called}
