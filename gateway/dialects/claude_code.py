"""What Claude Code adds to the words of a system for its maker alone, another each time.

With it no prompt would begin like the one before: the whole conversation would be computed anew.

billing    a block of its own: `x-anthropic-billing-header: ...`
countdown  `<total_tokens>N tokens left</total_tokens>`, at the end of a system or as one of its own
"""

from __future__ import annotations

import re

_BILLING = "x-anthropic-billing-header:"
# With the blanks before it, which are looked through once, not from each of them again.
_COUNTDOWN = re.compile(r"(?<!\s)\s*<total_tokens>[^<]*</total_tokens>")


def for_models(content: object) -> object:
    """A system, text or blocks, without these. What is neither is left as it is."""
    if isinstance(content, str):
        return _COUNTDOWN.sub("", content)
    if not isinstance(content, list):
        return content
    return [block for each in content if (block := _for_models(each)) is not None]


def _for_models(block: object) -> object:
    """None: nothing of it is."""
    text = block.get("text") if isinstance(block, dict) else None
    if not isinstance(block, dict) or not isinstance(text, str):
        return block
    said = "" if text.startswith(_BILLING) else _COUNTDOWN.sub("", text)
    return {**block, "text": said} if said else None
