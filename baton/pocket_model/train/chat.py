"""Chat conversations: the questions people may ask, in many phrasings, with readable answers.

Three sources are mixed: `smalltalk.txt` (written for Baton), `invented` (templates) and the
standard library's own documentation (`symbols`). One answer per subject keeps greedy decoding
on the path that the model has learned.
"""

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from baton.pocket_model.train.invented import Turns, invent
from baton.pocket_model.train.symbols import (
    CORE_MODULES,
    OTHER_MODULES,
    Symbol,
    statements,
    symbols,
)

_WHAT = (
    "What does {x} do?", "What is {x}?", "What's {x}?", "Explain {x}.", "Explain {x} to me.",
    "Tell me about {x}.", "Describe {x}.", "Can you explain {x}?", "What is {x} for?",
    "What is {x} used for?", "Please explain what {x} does.", "What does {x} mean?",
    "I want to know about {x}.", "Give me a short explanation of {x}.", "help({x})", "{x}",
    "How does {x} work?", "Explain how {x} works.", "I want to learn about {x}.",
    "What can you tell me about {x}?", "What do you know about {x}?",
    "Can you tell me what {x} does?", "What is the purpose of {x}?", "Define {x}.",
)  # fmt: skip
_HOW = (
    "How do I use {x}?", "How can I use {x}?", "Show me how to use {x}.", "How do I call {x}?",
    "Give me an example of {x}.", "How to use {x}?", "Show me an example of {x}.",
    "How does one use {x}?", "Example of {x}", "How is {x} used?",
)  # fmt: skip
_IMPORT = ("How do I import {x}?", "How can I import {x}?", "Import {x}", "Where do I find {x}?")
_NAMES = ("What is in {x}?", "What does {x} contain?", "List the functions of {x}.",
          "Which functions does {x} have?", "Which names are in {x}?")  # fmt: skip
_ARGUMENTS = ("What arguments does {x} take?", "Which arguments does {x} have?",
              "What are the arguments of {x}?", "What are the parameters of {x}?")  # fmt: skip
# Phrasings never trained on: with them the held-out chat perplexity is measured.
_HELD_OUT_WHAT = ("Could you please describe {x} for me?", "I would like to understand {x}.")
_SYSTEM = (
    "You are a helpful assistant.", "You are a helpful assistant.", "Answer briefly.",
    "You are an assistant that answers questions about Python.", "Be polite and brief.",
    "You are a helpful, respectful and honest assistant.", "Answer in English.",
    "You are an AI assistant. Answer the question of the user.", "You are a Python expert.",
)  # fmt: skip


_FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Message:
    role: Literal["system", "user", "assistant"]
    content: str


def _smalltalk() -> list[tuple[tuple[str, ...], str]]:
    entries: list[tuple[tuple[str, ...], str]] = []
    text = (_FOLDER / "smalltalk.txt").read_text(encoding="utf-8")
    for block in ("\n" + text).split("\n? ")[1:]:
        questions, _, answer = block.partition("\n")
        entries.append((tuple(q.strip() for q in questions.split(" | ")), answer.strip()))
    return entries


def _what(symbol: Symbol) -> str:
    name, home = symbol.name, symbol.home
    if symbol.kind == "module":
        return f"`{name}` is a module of the standard library. {symbol.summary}"
    if symbol.kind == "statement":
        return symbol.summary
    article = "an" if symbol.kind == "exception" else "a"
    if symbol.kind == "method":
        return f"`{name}` is a method of `{home}`. {symbol.summary}"
    if home == "builtins":
        return f"`{name}` is {article} built-in {symbol.kind}. {symbol.summary}".replace(
            "an b", "a b"
        )
    return f"`{name}` is {article} {symbol.kind} of the `{home}` module. {symbol.summary}"


def _how(symbol: Symbol) -> str:
    call = f"{symbol.name}({', '.join(symbol.required)})"
    if symbol.kind == "method":
        return f"Call `{symbol.short_name}` on a `{symbol.home}` object. {symbol.summary}"
    if symbol.kind == "module":
        return f"Write `import {symbol.name}` first. {symbol.summary}"
    lines = [call] if symbol.home == "builtins" else [f"import {symbol.home}", "", call]
    return symbol.summary + "\n\n```python\n" + "\n".join(lines) + "\n```"


def _listed(names: tuple[str, ...]) -> str:
    shown = [f"`{name}`" for name in names[:8]]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


class ChatSource:
    """Draws conversations. The same seed gives the same conversations."""

    def __init__(self, seed: int, words: Sequence[str], *, held_out: bool = False) -> None:
        self._rng = random.Random(seed)
        self._held_out = held_out
        self._smalltalk = _smalltalk()
        self._texts = (_FOLDER / "completions.txt").read_text(encoding="utf-8").splitlines()
        self._core = symbols(CORE_MODULES, with_methods=True) + statements()
        self._other = symbols(OTHER_MODULES, with_methods=False)
        every = self._core + self._other
        endings = Counter(symbol.short_name for symbol in every)
        asked = " ".join(q for questions, _ in self._smalltalk for q in questions)
        known = set(endings) | set(re.findall(r"[a-z]+", asked.lower()))
        subjects = (_FOLDER / "subjects.txt").read_text(encoding="utf-8").strip().split(", ")
        # Ordinary words that no other question is about; everyday ones as often as technical ones.
        self._words = [w for w in [*words, *subjects * 5] if w.lower() not in known]
        # A plain spelling such as "dedent" is asked about only where one name ends in it.
        self._unique = {name for name, n in endings.items() if n == 1 and len(name) > 3}
        self._modules = [symbol for symbol in every if symbol.kind == "module"]

    def conversation(self) -> list[Message]:
        """One conversation; sometimes with a system message, sometimes of several turns."""
        rng = self._rng
        if self._held_out:
            turns = [self._about(rng.choice(self._core), _HELD_OUT_WHAT)]
        else:
            turns = self._turns()
            while rng.random() < 0.2 and len(turns) < 5:
                turns += self._turns()
        messages = [Message("system", rng.choice(_SYSTEM))] if rng.random() < 0.3 else []
        for question, answer in turns:
            messages += [Message("user", question), Message("assistant", answer)]
        return messages

    def text(self) -> str:
        """A short text without roles, for completions of raw prompts."""
        rng = self._rng
        if rng.random() < 0.5:
            return rng.choice(self._texts)
        return self._turns()[0][1]

    def _turns(self) -> Turns:
        rng = self._rng
        draw = rng.random()
        if draw < 0.3:
            questions, answer = rng.choice(self._smalltalk)
            return [(self._styled(rng.choice(questions)), answer)]
        if draw < 0.58:
            return [(self._styled(q, plain=True), a) for q, a in invent(rng, self._words)]
        if draw < 0.66:
            return [self._about_module(rng.choice(self._modules))]
        return [self._about(rng.choice(self._core if draw < 0.9 else self._other), None)]

    def _about(self, symbol: Symbol, phrasings: tuple[str, ...] | None) -> tuple[str, str]:
        rng = self._rng
        spelled = self._spelled(symbol)
        if phrasings:
            return rng.choice(phrasings).format(x=spelled), _what(symbol)
        draw = rng.random()
        if symbol.kind == "statement" or draw < 0.7:
            return self._ask(_WHAT, spelled), _what(symbol)
        if draw < 0.75 and symbol.arguments:
            text = f"`{symbol.name}` takes {_listed(symbol.arguments)}."
            return self._ask(_ARGUMENTS, spelled), text
        return self._ask(_HOW, spelled), _how(symbol)

    def _about_module(self, symbol: Symbol) -> tuple[str, str]:
        draw = self._rng.random()
        spelled = self._spelled(symbol)
        if draw < 0.6:
            return self._ask(_WHAT, spelled), _what(symbol)
        if draw < 0.75:
            return self._ask(_HOW, spelled), _how(symbol)
        if draw < 0.85 or not symbol.members:
            return self._ask(_IMPORT, spelled), f"Write `import {symbol.name}`."
        text = f"The `{symbol.name}` module has {_listed(symbol.members)}, among others."
        return self._ask(_NAMES, spelled), text if len(symbol.members) > 8 else text.replace(
            ", among others", ""
        )

    def _spelled(self, symbol: Symbol) -> str:
        rng = self._rng
        short = symbol.short_name in self._unique and rng.random() < 0.25
        name = symbol.short_name if short else symbol.name
        quoted = f"`{name}`" if rng.random() < 0.5 else name
        if symbol.kind == "statement" or (symbol.kind == "module" and rng.random() < 0.7):
            return f"the {quoted} {symbol.kind}"
        called = symbol.kind in ("function", "method") and rng.random() < 0.15
        if called:
            return f"{name}()"
        return rng.choice((quoted, quoted, quoted, f"the {symbol.kind} {quoted}"))

    def _ask(self, phrasings: tuple[str, ...], spelled: str) -> str:
        return self._styled(self._rng.choice(phrasings).format(x=spelled))

    def _styled(self, question: str, *, plain: bool = False) -> str:
        """`question` as typed by different people: case, final mark, courtesy."""
        rng = self._rng
        if rng.random() < 0.25:
            question = question[0].lower() + question[1:]
        if rng.random() < 0.3:
            question = question.rstrip("?.!")
        elif question[-1].isalpha() and rng.random() < 0.4:
            question += rng.choice((".", "!", "?"))
        if plain or rng.random() < 0.8:
            return question
        lowered = question[0].lower() + question[1:]
        return rng.choice(
            (f"Please {lowered}", f"Hi, {lowered}", f"Hello! {question}", f"{question} Please.",
             f"{question} Thanks.", f"Question: {question}", f"Hey, {lowered}", f"{question}\n")
        )  # fmt: skip
