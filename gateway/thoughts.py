"""What a model thinks before it answers, told from the answer: `<think>` ... `</think>`.

Life of a splitter
    1. UNDECIDED  until the first letters are there: only an answer that begins with the mark has
                  thoughts, or one whose prompt ends with it. Some models write it again even so.
    2. THINKING   until the closing mark, or the end: thoughts that are cut short are thoughts.
    3. ANSWERING  to the end, marks included.
"""

from __future__ import annotations

from enum import Enum, auto

from gateway.markers import overlap

OPENING = "<think>"
CLOSING = "</think>"


class State(Enum):
    UNDECIDED = auto()
    THINKING = auto()
    ANSWERING = auto()


class ThoughtSplitter:
    """One per choice. Text in, (thought, answer) out."""

    def __init__(self, *, has_begun: bool) -> None:
        self._state = State.UNDECIDED
        self._has_begun = has_begun
        self._held = ""
        self._is_first = True  # of the answer: blank lines behind the thoughts are nobody's

    @property
    def is_thinking(self) -> bool:
        return self._state is State.THINKING or (self._state is State.UNDECIDED and self._has_begun)

    def push(self, text: str) -> tuple[str, str]:
        self._held += text
        if self._state is State.UNDECIDED:
            self._decide()
        thought = self._think() if self._state is State.THINKING else ""
        return thought, self._answer() if self._state is State.ANSWERING else ""

    def flush(self) -> tuple[str, str]:
        """The choice is over."""
        rest, self._held = self._held, ""
        return (rest, "") if self.is_thinking else ("", rest)

    def _decide(self) -> None:
        begun = self._held.lstrip()
        if begun.startswith(OPENING):
            self._state, self._held = State.THINKING, begun.removeprefix(OPENING)
        elif begun and not OPENING.startswith(begun):
            self._state = State.THINKING if self._has_begun else State.ANSWERING
            self._is_first = self._has_begun

    def _think(self) -> str:
        thought, closing, rest = self._held.partition(CLOSING)
        if closing:
            self._state, self._held = State.ANSWERING, rest
            return thought
        end = len(self._held) - overlap(self._held, CLOSING)
        thought, self._held = self._held[:end], self._held[end:]
        return thought

    def _answer(self) -> str:
        text, self._held = self._held, ""
        if self._is_first:
            text = text.lstrip()
            self._is_first = not text
        return text


def thinks(template_source: str) -> bool:
    """True when the chat template knows of thoughts, so that the model writes some."""
    return CLOSING in template_source


def has_begun(prompt: str) -> bool:
    """True when the template has opened the thoughts for the model."""
    return prompt.rstrip().endswith(OPENING)
