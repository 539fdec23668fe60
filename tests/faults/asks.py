"""What clients ask for, drawn from a seed: the same seed asks for the same."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

FIRST_TOKEN, VOCABULARY = 10, 6000  # of the bundled model; its first ids are special
DEADLINE_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request. Its client leaves once it has `leaves_after` tokens, by FIN or by RST."""

    number: int
    prompt: tuple[int, ...]
    num_tokens: int
    is_stream: bool = True
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    cache_salt: str | None = None  # of its tenant
    stop: str | None = None
    stop_token_ids: tuple[int, ...] = ()
    more: tuple[tuple[str, Any], ...] = ()  # fields of the body, by their names
    deadline_seconds: float = DEADLINE_SECONDS
    leaves_after: int | None = None
    leaves_by_reset: bool = False

    @property
    def id(self) -> str:
        """By which the gateway knows it, too."""
        return f"ask-{self.number}"

    @property
    def headers(self) -> dict[str, str]:
        return {
            "x-request-id": self.id,
            "x-request-deadline-ms": str(round(self.deadline_seconds * 1000)),
        }

    @property
    def body(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": "pocket",
            "prompt": list(self.prompt),
            "max_tokens": self.num_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": self.is_stream,
        }
        if self.is_stream:
            body["stream_options"] = {"include_usage": True}
        optional = {
            "seed": self.seed,
            "cache_salt": self.cache_salt,
            "stop": self.stop,
            "stop_token_ids": list(self.stop_token_ids) or None,
        }
        given = {name: value for name, value in optional.items() if value is not None}
        return {**body, **given, **dict(self.more)}


def draw_prompt(draw: random.Random, low: int, high: int) -> tuple[int, ...]:
    """Between `low` and `high` random tokens."""
    count = draw.randrange(low, high + 1)
    return tuple(draw.randrange(FIRST_TOKEN, VOCABULARY) for _ in range(count))


def draw_asks(
    seed: int, count: int, *, prompt: tuple[int, int] = (40, 160), num_tokens: int = 32
) -> list[Ask]:
    """Streams of prompts that have nothing in common."""
    draw = random.Random(seed)
    return [
        Ask(number=number, prompt=draw_prompt(draw, *prompt), num_tokens=num_tokens)
        for number in range(count)
    ]
