"""Train the pocket model: `python -m baton.pocket_model.train.train --output FOLDER --minutes 8`.

1. The corpus and the conversations are made from the standard library of this interpreter.
2. The tokenizer is learned from them.
3. For the first part of the time all rows teach language: text, code and whole conversations.
4. For the rest the model learns to answer: only the answers' tokens count.
5. The learning rate falls with the time used, so training ends when the time does. The folder
   is also written on the way; a run that is cut short leaves a usable checkpoint.
"""

import argparse
import json
import math
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn

from baton.pocket_model.train import batches, corpus, evaluate
from baton.pocket_model.train.chat import ChatSource
from baton.pocket_model.train.export import export
from baton.pocket_model.train.model import PocketModel, Shape
from baton.pocket_model.train.tokenizer import train_tokenizer

_LANGUAGE_SHARE = 0.4  # of the time
_WARM_UP = 0.02
_SAVE_SECONDS = 90.0
# Shares of the rows: (prose, code, conversations), in the first and in the second part.
_LANGUAGE_MIX = (0.12, 0.18, 0.7)
_ANSWER_MIX = (0.03, 0.02, 0.95)


@dataclass(frozen=True, slots=True)
class Rows:
    """What training draws from, and the two held-out batches."""

    prose: batches.TextRows
    code: batches.TextRows
    chat: batches.ChatRows
    held_out_prose: batches.Batch
    held_out_chat: batches.Batch

    def draw(self, rows: int, generator: torch.Generator, *, answers_only: bool) -> batches.Batch:
        prose, code, _ = _ANSWER_MIX if answers_only else _LANGUAGE_MIX
        num_prose, num_code = round(rows * prose), round(rows * code)
        num_chat = rows - num_prose - num_code
        parts = [self.chat.draw(num_chat, generator, answers_only=answers_only)]
        if num_prose:
            parts.append(self.prose.draw(num_prose, generator))
        if num_code:
            parts.append(self.code.draw(num_code, generator))
        return batches.join(parts)


def _texts(documents: list[corpus.Document]) -> list[str]:
    return [document.text for document in documents]


def prepare(options: argparse.Namespace, device: torch.device) -> tuple[Tokenizer, Rows]:
    """Build the corpus, learn the tokenizer, encode everything."""
    prose, held_out = corpus.split(corpus.prose_documents())
    code, _ = corpus.split(corpus.code_documents())
    random.Random(options.seed).shuffle(code)
    words = corpus.common_words(prose)
    source = ChatSource(options.seed, words)
    sample = [message.content for _ in range(20000) for message in source.conversation()]
    tokenizer = train_tokenizer([*_texts(prose), *_texts(code[:60]), *sample])
    chats = batches.encode_chats(tokenizer, source, options.conversations)
    unseen = batches.encode_chats(
        tokenizer, ChatSource(options.seed + 1, words, held_out=True), 400, texts=False
    )
    length = options.length

    def text_rows(texts: list[str]) -> batches.TextRows:
        return batches.TextRows(batches.encode_texts(tokenizer, texts), length, device)

    held_out_chat = batches.ChatRows(unseen, length, device)
    every = torch.arange(len(held_out_chat.token_ids), device=device)
    rows = Rows(
        prose=text_rows(_texts(prose)),
        code=text_rows(_texts(code)),
        chat=batches.ChatRows(chats, length, device),
        held_out_prose=text_rows(_texts(held_out)).windows(),
        held_out_chat=held_out_chat.take(every, answers_only=True),
    )
    return tokenizer, rows


def make_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.02),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate_factor(progress: float) -> float:
    """Learning rate, as a share of its peak, at `progress` (0 to 1) of the time."""
    if progress < _WARM_UP:
        return max(progress / _WARM_UP, 0.02)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


class Training:
    """One run: the model, its optimizers and the clock."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self._options = options
        self._device = device
        self._begin = time.monotonic()
        torch.manual_seed(options.seed)
        self.tokenizer, self._rows = prepare(options, device)
        self._say(f"data ready: {len(self._rows.chat.token_ids)} rows of conversations")
        self.model = PocketModel(Shape()).to(device)
        self._step_model = torch.compile(self.model) if options.compile else self.model
        self._optimizers = make_optimizers(self.model)
        self._peaks = [optimizer.param_groups[0]["lr"] for optimizer in self._optimizers]
        self._generator = torch.Generator().manual_seed(options.seed)

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._begin:6.1f} s] {text}", flush=True)

    def run(self) -> None:
        """Train until the time is used, then report and export."""
        end = self._begin + 60 * self._options.minutes
        begin = saved = time.monotonic()
        step = 0
        while (now := time.monotonic()) < end:
            progress = (now - begin) / (end - begin)
            loss = self._step(progress)
            step += 1
            if step % 100 == 0:
                self._say(f"step {step} progress {progress:.3f} loss {loss.item():.3f}")
            if now - saved > _SAVE_SECONDS:
                saved = now
                self.report(step, num_answers=3)
        self.report(step, num_answers=len(evaluate.PROMPTS))

    def _step(self, progress: float) -> torch.Tensor:
        answers_only = progress > _LANGUAGE_SHARE
        batch = self._rows.draw(self._options.rows, self._generator, answers_only=answers_only)
        with torch.autocast(self._device.type, torch.bfloat16):
            logits = self._step_model(batch.token_ids, batch.mask())
            loss = evaluate.token_losses(logits, batch).mean()
        torch.autograd.backward(loss)
        for optimizer, peak in zip(self._optimizers, self._peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate_factor(progress)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def report(self, step: int, *, num_answers: int) -> None:
        """Write the checkpoint folder; print held-out perplexity and some greedy answers."""
        self.model.eval()
        folder = Path(self._options.output)
        export(self.model, self.tokenizer, folder)
        figures = {
            "steps": step,
            "trained_tokens": step * self._options.rows * self._options.length,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "python": sys.version.split()[0],
            "held_out_prose_perplexity": evaluate.perplexity(self.model, self._rows.held_out_prose),
            "held_out_phrasing_answer_perplexity": evaluate.perplexity(
                self.model, self._rows.held_out_chat
            ),
        }
        figures["held_out_phrasing_exact_share"] = evaluate.exact_share(
            self.model, self._rows.held_out_chat
        )
        self._say(json.dumps(figures))
        (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
        for prompt in evaluate.PROMPTS[:num_answers]:
            print(f"> {prompt}\n{evaluate.answer(self.model, self.tokenizer, prompt)}", flush=True)
        self.model.train()


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the pocket model.")
    parser.add_argument("--output", required=True, help="folder to write the checkpoint to")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything")
    parser.add_argument("--rows", type=int, default=128, help="rows in a batch")
    parser.add_argument("--length", type=int, default=1024, help="tokens in a row")
    parser.add_argument("--conversations", type=int, default=400_000, help="how many to make")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    return parser.parse_args(argv)


def main() -> None:
    options = parse_options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    Training(options, device).run()


if __name__ == "__main__":
    main()
