"""Token ids back to text, one step at a time.

Life of a detokenizer (one per sequence)
    1. `push` takes the ids of a step and gives the text that is certain now. Bytes of an
       unfinished character are held back.
    2. `flush` gives what is left when no id will follow; unfinished characters become U+FFFD.

The pieces joined are what the tokenizer's own `decode` makes of all ids at once. Byte-level
vocabularies (GPT-2 and its heirs) have a table from id to bytes and never decode twice; all
others are decoded in a sliding window that begins at the last id known to be finished, so that
word-boundary spaces come out as in the whole.
"""

from __future__ import annotations

import codecs
import re
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from tokenizers import Tokenizer as Backend

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
_REPLACEMENT = "\ufffd"
# A character has four bytes at most, and an id one at least. More ids that end in a replacement are
# text of their own, and to wait on would decode all of them again with each that follows.
_MAX_UNFINISHED_IDS = 8


class Detokenizer(Protocol):
    def push(self, token_ids: Sequence[int]) -> str: ...
    def flush(self) -> str: ...


class TokenBytes(Protocol):
    """What one token stands for, taken alone."""

    def __getitem__(self, token_id: int, /) -> bytes: ...


class ByteLevelTable(dict[int, bytes]):
    """Id to bytes for byte-level vocabularies, filled as ids are met. Unknown ids are empty."""

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self._backend = backend

    def __missing__(self, token_id: int) -> bytes:
        piece = self._backend.id_to_token(token_id)
        self[token_id] = value = b"" if piece is None else byte_level_bytes(piece)
        return value


class PieceTable(dict[int, bytes]):
    """Id to bytes for sentencepiece-like vocabularies: U+2581 is a space, <0x0A> a byte."""

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self._backend = backend

    def __missing__(self, token_id: int) -> bytes:
        piece = self._backend.id_to_token(token_id)
        self[token_id] = value = b"" if piece is None else piece_bytes(piece)
        return value


class ByteLevelDetokenizer:
    """`table` is shared by all sequences; `skipped` are special ids that leave no text."""

    __slots__ = ("_decode", "_skipped", "_table")

    def __init__(self, table: ByteLevelTable, skipped: Collection[int]) -> None:
        self._table = table
        self._skipped = skipped
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, token_ids: Sequence[int]) -> str:
        table = self._table
        skipped = self._skipped
        return self._decode(b"".join([table[i] for i in token_ids if i not in skipped]))

    def flush(self) -> str:
        return self._decode(b"", True)


class WindowDetokenizer:
    """For any decoder. `_ids[_begin:_read]` gave `_known`; what follows is not yet said."""

    __slots__ = ("_backend", "_begin", "_ids", "_known", "_read", "_skipped")

    def __init__(self, backend: Backend, skipped: Collection[int]) -> None:
        self._backend = backend
        self._skipped = skipped
        self._ids: list[int] = []
        self._begin = 0
        self._read = 0
        self._known = ""

    def push(self, token_ids: Sequence[int]) -> str:
        new_ids = [i for i in token_ids if i not in self._skipped]
        if not new_ids:
            return ""
        self._ids += new_ids
        if self._is_byte(new_ids[-1]):
            return ""  # a run of bytes is text or U+FFFD as a whole: wait for its end
        text = self._decode_window()
        may_go_on = len(self._ids) - self._read < _MAX_UNFINISHED_IDS
        return "" if may_go_on and text.endswith(_REPLACEMENT) else self._advance(text)

    def flush(self) -> str:
        return self._advance(self._decode_window())

    def _decode_window(self) -> str:
        text: str = self._backend.decode(self._ids[self._begin :], skip_special_tokens=False)
        return text

    def _advance(self, text: str) -> str:
        piece = text[len(self._known) :]
        del self._ids[: self._read]
        self._begin, self._read = 0, len(self._ids)
        self._known = self._decode_window()
        return piece

    def _is_byte(self, token_id: int) -> bool:
        piece = self._backend.id_to_token(token_id)
        return piece is not None and _BYTE_PIECE.match(piece) is not None


def byte_level_bytes(piece: str) -> bytes:
    """The bytes of a byte-level piece; an added token with foreign characters is plain text."""
    try:
        return bytes([_BYTE_OF_CHAR[char] for char in piece])
    except KeyError:
        return piece.encode()


def piece_bytes(piece: str) -> bytes:
    match = _BYTE_PIECE.match(piece)
    if match is not None:
        return bytes([int(match.group(1), 16)])
    return piece.replace("\u2581", " ").encode()


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the rest for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return table


_BYTE_OF_CHAR = _byte_of_char()
