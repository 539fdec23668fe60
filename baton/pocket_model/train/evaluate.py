"""What a checkpoint can do: perplexity on held-out text, and greedy answers to first prompts."""

import math

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from baton.pocket_model.train.batches import Batch
from baton.pocket_model.train.chat import Message
from baton.pocket_model.train.tokenizer import END_ID, START, render

PROMPTS = (
    "Hello!",
    "Who are you?",
    "Tell me about Python.",
    "What does textwrap.dedent do?",
    "How do I use json.dumps?",
    "What does the with statement do?",
    "Why is the sky blue?",
    "What is 2+2?",
    "Write a haiku about the ocean.",
    "Tell me a story about a fox.",
    "Count to ten.",
    "What do you think about jazz?",
    "How many moons does Saturn have?",
    "Repeat after me: the blue elephant likes tea",
    "What is 17 * 3?",
)


def token_losses(logits: Tensor, batch: Batch) -> Tensor:
    """float32 [n]: the loss of every counted token that has a predecessor in its segment."""
    same = batch.segments[:, 1:] == batch.segments[:, :-1]
    counted = batch.counts[:, 1:] & same
    targets = torch.where(counted, batch.token_ids[:, 1:], -100)
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="none"
    )
    return losses[counted.flatten()]


@torch.no_grad()
def perplexity(model: nn.Module, batch: Batch, *, rows: int = 16) -> float:
    """exp of the mean loss of the counted tokens, `rows` rows at a time."""
    parts = []
    for start in range(0, len(batch.token_ids), rows):
        part = batch.rows(start, start + rows)
        parts.append(token_losses(model(part.token_ids, part.mask()), part))
    return math.exp(torch.cat(parts).mean().item())


@torch.no_grad()
def exact_share(model: nn.Module, batch: Batch, *, rows: int = 16) -> float:
    """Share of the segments in which every counted token is the model's first choice."""
    right = total = 0
    for start in range(0, len(batch.token_ids), rows):
        part = batch.rows(start, start + rows)
        wrong = model(part.token_ids, part.mask())[:, :-1].argmax(-1) != part.token_ids[:, 1:]
        counted, segments = part.counts[:, 1:], part.segments[:, 1:]
        for row in range(len(segments)):
            every = set(segments[row][counted[row]].tolist())
            missed = set(segments[row][counted[row] & wrong[row]].tolist())
            total += len(every)
            right += len(every - missed)
    return right / max(total, 1)


@torch.no_grad()
def answer(model: nn.Module, tokenizer: Tokenizer, question: str, *, limit: int = 200) -> str:
    """The greedy answer; ends in " [cut]" when the model did not end it within `limit` tokens."""
    pieces, _ = render([Message("user", question)])
    prompt = "".join(pieces) + f"{START}assistant\n"
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    device = next(model.parameters()).device
    written: list[int] = []
    while len(written) < limit:
        logits = model(torch.tensor([ids + written], device=device))
        token_id = int(logits[0, -1].argmax())
        if token_id == END_ID:
            return str(tokenizer.decode(written))
        written.append(token_id)
    return str(tokenizer.decode(written)) + " [cut]"
