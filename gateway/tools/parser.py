"""Text of a model, in pieces that cut anywhere -> content for the client, and calls of tools.

Life of a parser
    1. Text goes through as content. What may be the beginning of `opening` is held back.
    2. After `opening`, text is gathered to `closing`, or to the end, and read as calls: a model
       that has said all of a call may end without `closing`. One that stands in a text of their
       JSON ends nothing, unless they turn out to be no calls, or it is one of very many: each is
       a place from which to look again.
    3. What cannot be read as calls is content after all, to the letter: nothing is swallowed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gateway.markers import overlap

if TYPE_CHECKING:
    from gateway.tools.formats import ToolCall, ToolFormat

MAX_PASSED = 64
_QUOTES = re.compile(r'\\.|"', re.DOTALL)


@dataclass(slots=True)
class Parsed:
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)


class ToolParser:
    """One per choice."""

    def __init__(self, form: ToolFormat) -> None:
        self._form = form
        self._held = ""
        self._may_lead = bool(form.bare)
        self._opening: str | None = None  # of what is gathered; None: text goes through
        self._passed: list[int] = []  # ends of closings in `_held` that stand in a text of JSON
        # Before the first call and behind each, until it is known whose they are.
        self._blanks: str | None = ""
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
        while self._opening is not None:
            self._read(len(self._held), "", parsed)
            while self._step(parsed):
                pass
        self._say(self._held, parsed)
        if not self.num_calls:
            parsed.content += self._blanks or ""
        self._held, self._blanks = "", None
        return parsed

    def _step(self, parsed: Parsed) -> bool:
        """True when there may be more to do at once."""
        if self._opening is not None:
            return self._close(parsed)
        if self._may_lead:
            return self._lead()
        return self._open(parsed)

    def _lead(self) -> bool:
        """The first character that is no blank decides."""
        head = self._held.lstrip()
        if not head:
            return False
        self._may_lead = False
        if head.startswith(self._form.bare):
            self._opening = ""
        return True

    def _open(self, parsed: Parsed) -> bool:
        before, opening, after = self._held.partition(self._form.opening)
        if opening:
            self._say(before, parsed)
            self._held, self._opening = after, opening
            return True
        kept = overlap(self._held, self._form.opening)
        self._say(self._held[: len(self._held) - kept], parsed)
        self._held = self._held[len(self._held) - kept :]
        return False

    def _close(self, parsed: Parsed) -> bool:
        closing = self._form.closing
        start = self._passed[-1] if self._passed else 0
        end = self._held.find(closing, start) if closing else -1
        if end < 0:
            return False
        may_pass = len(self._passed) < MAX_PASSED
        if may_pass and _ends_in_text(self._held, start, end, begins_in_text=bool(self._passed)):
            self._passed.append(end + len(closing))
        else:
            self._read(end, closing, parsed)
        return True

    def _read(self, end: int, closing: str, parsed: Parsed) -> None:
        """What was gathered up to `end`, where `closing` stands. When it is no call after all, it
        ended with the first closing."""
        calls, rest = self._form.parse(self._held[:end])
        after = end + len(closing)
        if calls:
            self.num_calls += len(calls)
            parsed.calls += calls
            self._blanks = ""
            self._say(rest, parsed)
        else:
            after = self._passed[0] if self._passed else after
            self._say((self._opening or "") + self._held[:after], parsed)
        self._held = self._held[after:]
        self._opening, self._passed = None, []

    def _say(self, text: str, parsed: Parsed) -> None:
        """Blanks before a call, between calls and behind the last are nobody's words."""
        if self._blanks is not None:
            text = self._blanks + text
            self._blanks = None if text.strip() else text
        if self._blanks is None:
            parsed.content += text


def _ends_in_text(body: str, start: int, end: int, *, begins_in_text: bool) -> bool:
    """Whether `end` lies in a text of JSON, of a body that is in one at `start` or not."""
    quotes = sum(found[0] == '"' for found in _QUOTES.finditer(body, start, end))
    return begins_in_text ^ bool(quotes % 2)
