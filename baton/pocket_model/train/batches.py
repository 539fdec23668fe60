"""Training rows: fixed-length token rows made of whole conversations or of one piece of text.

A row carries, for each token, the number of its segment (attention stays inside a segment) and
whether predicting it counts. Conversations count either wholly or in their answers only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from baton.pocket_model.train.chat import ChatSource
from baton.pocket_model.train.tokenizer import BOS_ID, PAD_ID, render, render_text

TEXTS_ONE_IN = 14


@dataclass(frozen=True, slots=True)
class Batch:
    """token_ids, segments: int64 [rows, length]; counts: bool [rows, length]."""

    token_ids: Tensor
    segments: Tensor
    counts: Tensor

    def rows(self, start: int, stop: int) -> "Batch":
        return Batch(self.token_ids[start:stop], self.segments[start:stop], self.counts[start:stop])

    def mask(self) -> Tensor:
        """bool [rows, 1, length, length]: causal, and inside the same segment."""
        length = self.token_ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.segments.device).tril()
        same = self.segments[:, :, None] == self.segments[:, None, :]
        return (same & causal)[:, None]


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """All texts as one int16 stream, each begun by `<|bos|>`."""
    encoded = tokenizer.encode_batch([*texts], add_special_tokens=False)
    parts = [np.array([BOS_ID, *item.ids], dtype=np.int16) for item in encoded]
    return np.concatenate(parts)


def encode_chats(
    tokenizer: Tokenizer, source: ChatSource, count: int, *, texts: bool = True
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(token ids int16, written by the model bool) of `count` conversations.

    One in `TEXTS_ONE_IN` is a text without roles, wholly written by the model.
    """
    rendered = [
        render_text(source.text())
        if texts and i % TEXTS_ONE_IN == 0
        else render(source.conversation())
        for i in range(count)
    ]
    flat = [piece for pieces, _ in rendered for piece in pieces]
    encoded = iter(tokenizer.encode_batch(flat, add_special_tokens=False))
    chats = []
    for pieces, written in rendered:
        ids: list[int] = []
        answer: list[bool] = []
        for _, mine in zip(pieces, written, strict=True):
            piece = next(encoded).ids
            ids += piece
            answer += [mine] * len(piece)
        chats.append((np.array(ids, dtype=np.int16), np.array(answer)))
    return chats


class ChatRows:
    """Conversations packed into rows, in memory of `device`."""

    def __init__(
        self,
        chats: Sequence[tuple[np.ndarray, np.ndarray]],
        length: int,
        device: torch.device,
    ) -> None:
        rows = _pack([ids.size for ids, _ in chats], length)
        token_ids = np.full((len(rows), length), PAD_ID, dtype=np.int16)
        segments = np.zeros((len(rows), length), dtype=np.int16)
        answers = np.zeros((len(rows), length), dtype=bool)
        for row, members in enumerate(rows):
            start = 0
            for segment, member in enumerate(members, 1):
                ids, answer = chats[member]
                end = min(start + ids.size, length)
                token_ids[row, start:end] = ids[: end - start]
                segments[row, start:end] = segment
                answers[row, start:end] = answer[: end - start]
                start = end
        self.token_ids = torch.from_numpy(token_ids).to(device)
        self._segments = torch.from_numpy(segments).to(device)
        self._answers = torch.from_numpy(answers).to(device)

    def draw(self, rows: int, generator: torch.Generator, *, answers_only: bool) -> Batch:
        count, device = len(self.token_ids), self.token_ids.device
        chosen = torch.randint(count, (rows,), generator=generator).to(device)
        return self.take(chosen, answers_only=answers_only)

    def take(self, chosen: Tensor, *, answers_only: bool) -> Batch:
        segments = self._segments[chosen].long()
        counts = self._answers[chosen] if answers_only else segments > 0
        return Batch(self.token_ids[chosen].long(), segments, counts)


def _pack(sizes: Sequence[int], length: int) -> list[list[int]]:
    rows: list[list[int]] = []
    free = 0
    for member, size in enumerate(sizes):
        if size > free:
            rows.append([])
            free = length
        rows[-1].append(member)
        free -= min(size, free)
    return rows


class TextRows:
    """Random windows of a token stream."""

    def __init__(self, stream: np.ndarray, length: int, device: torch.device) -> None:
        self._stream = torch.from_numpy(stream).to(device)
        self._length = length

    def draw(self, rows: int, generator: torch.Generator) -> Batch:
        device = self._stream.device
        last = self._stream.numel() - self._length
        starts = torch.randint(last, (rows, 1), generator=generator).to(device)
        token_ids = self._stream[starts + torch.arange(self._length, device=device)].long()
        ones = torch.ones_like(token_ids)
        return Batch(token_ids, ones, ones.bool())

    def windows(self) -> Batch:
        """The stream cut into consecutive rows, the rest dropped."""
        rows = self._stream.numel() // self._length
        token_ids = self._stream[: rows * self._length].view(rows, self._length).long()
        ones = torch.ones_like(token_ids)
        return Batch(token_ids, ones, ones.bool())


def join(batches: Sequence[Batch]) -> Batch:
    return Batch(
        torch.cat([b.token_ids for b in batches]),
        torch.cat([b.segments for b in batches]),
        torch.cat([b.counts for b in batches]),
    )
