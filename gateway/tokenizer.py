"""Text to token ids and back, for the one model this gateway serves.

1. `Tokenizer.from_folder` reads `tokenizer.json` and `tokenizer_config.json` at start.
2. `encode` turns a prompt into ids: short ones at once, long ones on a thread, so that one
   client's book does not delay another's token.
3. `detokenizer` gives a fresh incremental decoder for one sequence.

Special tokens follow Hugging Face: a plain prompt gets what the tokenizer's post-processor
adds (a beginning-of-sequence token, mostly), text made by a chat template gets nothing, because
the template wrote it.
"""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from tokenizers import Tokenizer as Backend

from cluster.errors import ConfigError
from cluster.model_folder import check_model_folder
from gateway.detokenizer import (
    ByteLevelDetokenizer,
    ByteLevelTable,
    Detokenizer,
    PieceTable,
    TokenBytes,
    WindowDetokenizer,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

T = TypeVar("T")
INLINE_CHARS = 2000
_NUM_THREADS = 2
_NO_IDS: frozenset[int] = frozenset()


class Tokenizer:
    """`vocab_size` is the model's: ids below it are safe to compute with."""

    def __init__(
        self, backend: Backend, *, vocab_size: int, special_tokens: dict[str, Any] | None = None
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.vocab_size = vocab_size
        self.special_tokens = special_tokens or {}
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self._is_byte_level = _is_byte_level(backend)
        self.token_bytes: TokenBytes = (
            ByteLevelTable(backend) if self._is_byte_level else PieceTable(backend)
        )
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="tokenize")

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Raises `ConfigError` when the folder holds no tokenizer that can be read."""
        check_model_folder(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"{folder} holds no tokenizer.json.", param="model")
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"tokenizer.json cannot be read: {error}", param="model") from error
        settings = read_json(folder / "tokenizer_config.json")
        special = read_json(folder / "special_tokens_map.json")
        special.update({k: v for k, v in settings.items() if k.endswith("_token") and v})
        vocab_size = _model_vocab_size(folder) or backend.get_vocab_size(with_added_tokens=True)
        return cls(backend, vocab_size=vocab_size, special_tokens=_plain_tokens(special))

    @property
    def executor(self) -> ThreadPoolExecutor:
        """Threads for work on text that is too long for the event loop."""
        return self._pool

    async def run(self, work: Callable[[], T], size: int) -> T:
        """Work on so many characters or ids: at once, or on a thread when there are many."""
        if size <= INLINE_CHARS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        work = partial(self.encode_now, text, add_special_tokens=add_special_tokens)
        return await self.run(work, len(text))

    def encode_now(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        return tuple(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """All at once, through the same code as a stream."""
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return detokenizer.push(token_ids) + detokenizer.flush()

    def detokenizer(self, *, skip_special_tokens: bool) -> Detokenizer:
        skipped = self._special_ids if skip_special_tokens else _NO_IDS
        if isinstance(self.token_bytes, ByteLevelTable):
            return ByteLevelDetokenizer(self.token_bytes, skipped)
        return WindowDetokenizer(self._backend, skipped)

    def piece(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of a token."""
        piece: str | None = self._backend.id_to_token(token_id)
        return piece

    def is_special(self, text: str) -> bool:
        """True when it is a special token, which a client does not see unless it asks for it."""
        return self._backend.token_to_id(text) in self._special_ids

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of the model folder; empty when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path.name} cannot be read: {error}", param="model") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path.name} must hold an object.", param="model")
    return value


def _model_vocab_size(folder: Path) -> int | None:
    settings = read_json(folder / "config.json")
    text_settings = settings.get("text_config")
    if isinstance(text_settings, dict):
        settings = text_settings
    size = settings.get("vocab_size")
    return size if isinstance(size, int) else None


def _plain_tokens(special: dict[str, Any]) -> dict[str, Any]:
    """`bos_token` and its like as text, whether written as text or as an object."""
    plain: dict[str, Any] = {}
    for name, value in special.items():
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            plain[name] = content
    return plain


def _is_byte_level(backend: Backend) -> bool:
    decoder = backend.decoder
    if decoder is None:
        return False
    described = json.loads(decoder.__getstate__())
    steps = described.get("decoders", [described])
    return bool(steps) and all(step.get("type") == "ByteLevel" for step in steps)
