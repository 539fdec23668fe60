"""Text of a model, in pieces that cut anywhere -> content for the client, and calls of tools.

Life of a parser
    1. Text goes through as content. What may be the beginning of `opening` is held back.
    2. After `opening`, text is gathered to `closing`, or to the end, and read as calls: a model
       that has said all of a call may end without `closing`.
    3. What cannot be read as calls is content after all, to the letter: nothing is swallowed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gateway.markers import overlap

if TYPE_CHECKING:
    from gateway.tools.formats import ToolCall, ToolFormat


@dataclass(slots=True)
class Parsed:
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)


class ToolParser:
    """One per choice."""

    def __init__(self, form: ToolFormat) -> None:
        self._form = form
        self._held = ""
        self._is_open = False
        self._may_open = True
        self._blanks: str | None = None  # behind a call, until it is known whose they are
        self.num_calls = 0

    def push(self, text: str) -> Parsed:
        self._held += text
        parsed = Parsed()
        while self._step(parsed):
            pass
        return parsed

    def flush(self) -> Parsed:
        """The message is over."""
        parsed = Parsed()
        if self._is_open:
            self._read(self._held, parsed)
        else:
            self._say(self._held, parsed)
        self._held, self._is_open = "", False
        return parsed

    def _step(self, parsed: Parsed) -> bool:
        """True when there may be more to do at once."""
        if self._is_open:
            return self._close(parsed)
        return self._open(parsed)

    def _open(self, parsed: Parsed) -> bool:
        if not self._may_open:
            self._say(self._held, parsed)
            self._held = ""
            return False
        if self._form.leads:
            return self._lead(parsed)
        before, opening, after = self._held.partition(self._form.opening)
        if opening:
            self._say(before, parsed)
            self._held, self._is_open = after, True
            return True
        kept = overlap(self._held, self._form.opening)
        self._say(self._held[: len(self._held) - kept], parsed)
        self._held = self._held[len(self._held) - kept :]
        return False

    def _lead(self, parsed: Parsed) -> bool:
        """The first character that is no blank decides, or the one behind `prefix`."""
        head, prefix = self._held.lstrip(), self._form.prefix
        if prefix.startswith(head.rstrip()):
            return False
        self._may_open = head.removeprefix(prefix).lstrip().startswith(self._form.opening)
        self._is_open = self._may_open
        return not self._is_open

    def _close(self, parsed: Parsed) -> bool:
        if not self._form.closing:
            return False
        body, closing, after = self._held.partition(self._form.closing)
        if not closing:
            return False
        self._held, self._is_open = after, False
        self._read(body, parsed, closing)
        return True

    def _read(self, body: str, parsed: Parsed, closing: str = "") -> None:
        calls, rest = self._form.parse(body)
        if calls:
            self.num_calls += len(calls)
            parsed.calls += calls
            self._blanks = ""
            self._say(rest, parsed)
            return
        opening = "" if self._form.leads else self._form.opening
        self._say(opening + body + closing, parsed)

    def _say(self, text: str, parsed: Parsed) -> None:
        """Blanks between calls, and behind the last, are nobody's words."""
        if self._blanks is not None:
            text = self._blanks + text
            self._blanks = None if text.strip() else text
        if self._blanks is None:
            parsed.content += text
