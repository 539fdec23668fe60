"""What a model thinks before it answers, told from the answer by marks around it.

Life of a splitter
    1. UNDECIDED  until the first letters are there: only an answer that begins with the mark has
                  thoughts, or one whose prompt ends with it. Some models write it again even so.
    2. THINKING   until the closing mark, or the end: thoughts that are cut short are thoughts.
    3. ANSWERING  to the end, marks included.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from gateway.markers import overlap


@dataclass(frozen=True, slots=True)
class ThoughtMarks:
    opening: str
    closing: str

    def have_begun(self, prompt: str) -> bool:
        """True when the template has opened the thoughts for the model."""
        return prompt.rstrip().endswith(self.opening)


TAGS = ThoughtMarks("<think>", "</think>")
MISTRAL = ThoughtMarks("[THINK]", "[/THINK]")  # since Magistral's second tokenizer


class State(Enum):
    UNDECIDED = auto()
    THINKING = auto()
    ANSWERING = auto()


class ThoughtSplitter:
    """One per choice. Text in, (thought, answer) out."""

    def __init__(self, marks: ThoughtMarks, *, has_begun: bool) -> None:
        self._marks = marks
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
        begun, opening = self._held.lstrip(), self._marks.opening
        if begun.startswith(opening):
            self._state, self._held = State.THINKING, begun.removeprefix(opening)
        elif begun and not opening.startswith(begun):
            self._state = State.THINKING if self._has_begun else State.ANSWERING
            self._is_first = self._has_begun

    def _think(self) -> str:
        thought, closing, rest = self._held.partition(self._marks.closing)
        if closing:
            self._state, self._held = State.ANSWERING, rest
            return thought
        end = len(self._held) - overlap(self._held, self._marks.closing)
        thought, self._held = self._held[:end], self._held[end:]
        return thought

    def _answer(self) -> str:
        text, self._held = self._held, ""
        if self._is_first:
            text = text.lstrip()
            self._is_first = not text
        return text


def thought_marks_of(template_source: str) -> ThoughtMarks | None:
    """Those that the chat template knows, so that the model writes them; None: of no thoughts."""
    return next((marks for marks in (TAGS, MISTRAL) if marks.closing in template_source), None)
