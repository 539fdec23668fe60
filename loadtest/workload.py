"""What is sent: prompts of chosen lengths, drawn and serialised before the clock starts.

    1. A `Vocabulary` says which token ids may be drawn, and turns ids into text.
    2. Lengths and ids come from one seeded generator: same seed, same bodies, byte for byte.
    3. Warm-up requests are drawn after the measured ones, so they share no prompt with them.

Without a tokenizer, completions get token ids, whose count is exact for any model, and chats
get plain words, whose count the server tells.
"""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cluster.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loadtest.config import BenchConfig

TokenIds = list[int]
_MAX_FITTING_ROUNDS = 8
_WORDS = (
    *("able", "air", "all", "answer", "area", "back", "bank", "base", "bird", "blue", "book"),
    *("box", "call", "car", "case", "city", "cold", "cost", "count", "day", "deep", "door"),
    *("each", "east", "end", "face", "fact", "fall", "far", "farm", "fast", "field", "fire"),
    *("fish", "food", "form", "full", "game", "glass", "gold", "good", "green", "hand", "head"),
    *("hill", "home", "hope", "hour", "house", "idea", "iron", "key", "kind", "land", "large"),
    *("late", "law", "leaf", "left", "life", "light", "line", "list", "long", "low", "main"),
    *("map", "mark", "mind", "moon", "name", "near", "new", "night", "north", "note", "ocean"),
    *("page", "part", "path", "plan", "play", "point", "rain", "red", "rest", "right", "river"),
    *("road", "rock", "room", "rule", "sea", "seed", "ship", "side", "sign", "sky", "small"),
)


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """`body` is the serialised request. `num_input_tokens` is the prompt's length as drawn."""

    index: int
    body: bytes
    num_input_tokens: int
    num_output_tokens: int


class Vocabulary(Protocol):
    """Ids that may be drawn are `allowed`; `text_of` gives text of about as many tokens."""

    allowed: np.ndarray[Any, np.dtype[np.int64]]

    def text_of(self, token_ids: TokenIds) -> str: ...


class PlainVocabulary:
    """For servers whose tokenizer is not at hand."""

    def __init__(self, size: int) -> None:
        self.allowed = np.arange(size, dtype=np.int64)

    def text_of(self, token_ids: TokenIds) -> str:
        return " ".join(_WORDS[token_id % len(_WORDS)] for token_id in token_ids)


class TokenizerVocabulary:
    """The ids of a tokenizer that are not special; text keeps its length when it is encoded."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        special = {
            token_id
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        size = tokenizer.get_vocab_size()
        self.allowed = np.array([i for i in range(size) if i not in special], dtype=np.int64)

    def text_of(self, token_ids: TokenIds) -> str:
        """Decoding joins tokens, so encoding again may give fewer or more; a few rounds fit it."""
        wanted, ids = len(token_ids), list(token_ids)
        for _ in range(_MAX_FITTING_ROUNDS):
            text = str(self._tokenizer.decode(ids))
            ids = self._encode(text)
            if len(ids) == wanted:
                return text
            ids = (ids + token_ids)[:wanted]
        return str(self._tokenizer.decode(ids))

    def count(self, text: str) -> int:
        return len(self._encode(text))

    def _encode(self, text: str) -> TokenIds:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


def load_tokenizer(path: str) -> TokenizerVocabulary:
    """From tokenizer.json or the folder that holds it. Raises `ConfigError`."""
    file = Path(path)
    # The gateway's library; a load tester who sends token ids does without it.
    tokenizers = importlib.import_module("tokenizers")
    try:
        file = file / "tokenizer.json" if file.is_dir() else file
        tokenizer = tokenizers.Tokenizer.from_file(str(file)) if file.is_file() else None
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(
            f"--tokenizer: {file} cannot be read: {error}.", param="tokenizer"
        ) from error
    if tokenizer is None:
        raise ConfigError(f"--tokenizer: {file} does not exist.", param="tokenizer")
    return TokenizerVocabulary(tokenizer)


def plan_requests(
    config: BenchConfig, model: str, vocabulary: Vocabulary
) -> tuple[list[PlannedRequest], list[PlannedRequest]]:
    """The requests to measure, and after them the warm-ups."""
    rng = np.random.default_rng(config.seed)
    as_text = config.backend == "openai-chat" or isinstance(vocabulary, TokenizerVocabulary)
    prefix = rng.choice(vocabulary.allowed, config.random_prefix_len).tolist()
    planned = []
    for index in range(config.num_prompts + config.num_warmups):
        num_input = _draw_length(rng, config.random_input_len, config.random_range_ratio)
        num_output = _draw_length(rng, config.random_output_len, config.random_range_ratio)
        token_ids = prefix + rng.choice(vocabulary.allowed, num_input).tolist()
        prompt = vocabulary.text_of(token_ids) if as_text else token_ids
        body = _request_body(config, model, prompt, num_output)
        planned.append(PlannedRequest(index, _serialise(body), len(token_ids), num_output))
    return planned[: config.num_prompts], planned[config.num_prompts :]


def _draw_length(rng: np.random.Generator, length: int, ratio: float) -> int:
    low, high = math.floor(length * (1.0 - ratio)), math.ceil(length * (1.0 + ratio))
    return int(rng.integers(max(1, low), max(1, high), endpoint=True))


def _request_body(
    config: BenchConfig, model: str, prompt: str | Sequence[int], num_output: int
) -> dict[str, Any]:
    body: dict[str, Any] = {"model": model}
    if config.backend == "openai":
        body |= {"prompt": prompt, "max_tokens": num_output}
    else:
        messages = [{"role": "user", "content": prompt}]
        body |= {"messages": messages, "max_completion_tokens": num_output}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    if config.ignore_eos:
        body["ignore_eos"] = True
    if config.temperature is not None:
        body["temperature"] = config.temperature
    return body | config.extra_fields


def _serialise(body: dict[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()
