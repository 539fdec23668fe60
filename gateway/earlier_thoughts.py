"""What an assistant thought in earlier turns, as chat templates take it: as `reasoning_content` of
a message or, as Mistral's, as a part of its content. `take_parts` finds out by trying, at start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cluster.errors import ServingError

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.thoughts import ThoughtMarks

Message = dict[str, Any]
_THOUGHT = "What was thought."


def take_parts(render: Callable[[list[Message]], str], marks: ThoughtMarks | None) -> bool:
    """Whether the template writes them between its marks, and not as they come from clients."""
    if marks is None:
        return False
    plain = {"role": "assistant", "content": "x", "reasoning_content": _THOUGHT}
    as_part = _rendered(render, with_part(plain))
    return _THOUGHT not in _rendered(render, plain) and f"{marks.opening}{_THOUGHT}" in as_part


def _rendered(render: Callable[[list[Message]], str], message: Message) -> str:
    try:
        return render([{"role": "user", "content": "x"}, message])
    except ServingError:
        return ""


def with_part(message: Message) -> Message:
    thought = message.get("reasoning_content")
    if not thought or message["role"] != "assistant":
        return message
    words = [{"type": "text", "text": message["content"]}] if message["content"] else []
    return {**message, "content": [{"type": "thinking", "thinking": thought}, *words]}
