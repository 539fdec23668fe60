"""What 8 and 4 bits cost in quality: perplexity of the pocket model under each.

    1. Held-out text as in training: documents of the standard library that its corpus put aside,
       and conversations in phrasings it never saw, of which only the answers count.
    2. Each variant loads the same checkpoint with the engine's own loader and runs whole
       sequences through the engine's decoder and a paged KV cache: every position attends to keys
       and values as they were stored.
    3. Perplexity, the share of positions whose first choice is that of float32, and bytes.

"8-bit products" is what a GPU computes: weights and inputs in float8. A CPU multiplies 8-bit
weights by inputs as they are: "8-bit weights".

The 4-bit checkpoint is made here: rounded to the nearest, without calibration, in AWQ's layout.
"""

from __future__ import annotations

import math
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy

from baton.pocket_model.train import corpus
from baton.pocket_model.train.batches import encode_chats, encode_texts
from baton.pocket_model.train.chat import ChatSource
from benchmarks.command import parser_of, publish
from benchmarks.int4_checkpoint import GROUP_SIZE, write_int4
from benchmarks.serve_process import ROOT
from cluster.startup import StartupReport
from engine import checkpoint_files, weights
from engine.batch import Batch
from engine.kv_cache import KVCache, KVLayout
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.linear import Linear
from engine.models.quantization import ON_LOAD
from engine.models.quantized_linear import matrix_factory

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from engine.models.linear import MatrixFactory
    from engine.models.quantization import Quantization

POCKET_MODEL = ROOT / "baton" / "pocket_model"
FLOAT8 = torch.float8_e4m3fn
BLOCK_SIZE = 16
ROW_TOKENS, BATCH_TOKENS = 512, 4096
_NOTE = """Prose is what the corpus of its training put aside; of the conversations only the answers
count. "8-bit products" rounds weights and inputs, as a GPU does; "8-bit weights" inputs not, as
on a CPU, which keeps 8 and 4 bits widened, hence the weights' size. 8-bit KV without scales in the
checkpoint. 4 bits are rounded to the nearest, without calibration. A model of 7.6 million
parameters has less to spare than a large one."""


@dataclass(frozen=True, slots=True)
class Text:
    """Token ids int64 `[n]`; `counts` bool `[n]`: whether predicting the token counts."""

    token_ids: torch.Tensor
    counts: torch.Tensor


@dataclass(frozen=True, slots=True)
class Variant:
    """`kv_dtype` None: as `dtype`. `quantization`: on load, or as the checkpoint says."""

    name: str
    dtype: torch.dtype
    quantization: Quantization | None = None
    kv_dtype: torch.dtype | None = None
    keeps_quantized: bool = False
    is_int4: bool = False


VARIANTS = (
    Variant("float32", torch.float32),
    Variant("bfloat16", torch.bfloat16),
    Variant("8-bit weights", torch.bfloat16, ON_LOAD),
    Variant("8-bit products", torch.bfloat16, ON_LOAD, keeps_quantized=True),
    Variant("8-bit KV", torch.bfloat16, kv_dtype=FLOAT8),
    Variant("8-bit products and KV", torch.bfloat16, ON_LOAD, FLOAT8, keeps_quantized=True),
    Variant(f"4-bit weights, groups of {GROUP_SIZE}", torch.bfloat16, is_int4=True),
)


@dataclass(frozen=True, slots=True)
class Scores:
    """`losses` float32 and `choices` int64 of every counted token, in order."""

    losses: torch.Tensor
    choices: torch.Tensor

    @property
    def perplexity(self) -> float:
        return math.exp(self.losses.mean().item())

    def agreement(self, reference: Scores) -> float:
        return (self.choices == reference.choices).float().mean().item()


class Model:
    """One variant, loaded."""

    def __init__(self, variant: Variant, folder: Path, device: torch.device) -> None:
        config = ModelConfig.from_folder(folder)
        if variant.quantization is not None:
            config = replace(config, quantization=variant.quantization)
        kv_dtype = variant.kv_dtype or variant.dtype
        make_matrix: MatrixFactory = partial(Linear.empty, dtype=variant.dtype, device=device)
        if variant.keeps_quantized:
            make_matrix = matrix_factory(
                config.quantization, frozenset(), dtype=variant.dtype, device=device
            )
        self._decoder = Decoder(
            config, max_model_len=config.max_position_embeddings, dtype=variant.dtype,
            device=device, make_matrix=make_matrix, kv_dtype=kv_dtype,
        )  # fmt: skip
        views = self._decoder.checkpoint_views()
        self.num_bytes = sum(map(weights.num_bytes, views.values()))
        with StartupReport(sink=lambda fact: None).phase("load weights") as phase:
            checkpoint = checkpoint_files.open_checkpoint(folder)
            weights.load_weights(checkpoint, views, phase, config.quantization)
        del views
        self._decoder.pack()
        self._device = device
        self._layout = KVLayout(
            num_layers=config.num_layers, block_size=BLOCK_SIZE, num_kv_heads=config.num_kv_heads,
            head_size=config.head_size, dtype=kv_dtype,
        )  # fmt: skip

    @property
    def kv_bytes_per_token(self) -> int:
        return self._layout.block_bytes // BLOCK_SIZE

    def scores(self, texts: Sequence[Text]) -> Scores:
        losses, choices = [], []
        for group in _groups(texts):
            logits = self._logits(group)
            begin = 0
            for text in group:
                rows = logits[begin : begin + len(text.token_ids) - 1]
                targets, counts = text.token_ids[1:], text.counts[1:]
                losses.append(cross_entropy(rows, targets, reduction="none")[counts])
                choices.append(rows.argmax(1)[counts])
                begin += len(text.token_ids)
        return Scores(torch.cat(losses), torch.cat(choices))

    def _logits(self, group: Sequence[Text]) -> torch.Tensor:
        """float32 `[tokens of all, vocab_size]` on the CPU."""
        batch, num_blocks = _batch(group, self._device)
        kv_cache = KVCache.allocate(self._layout, num_blocks, self._device)
        with torch.inference_mode():
            hidden = self._decoder.forward(batch, kv_cache.layers)
            if hidden is None:
                raise ValueError("no row was asked for")
            return self._decoder.logits(hidden).float().cpu()


def main() -> None:
    parser = parser_of("quantization", __doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--num-rows", type=int, default=64, help="rows of 512 tokens of prose")
    parser.add_argument("--num-chats", type=int, default=200, help="conversations")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    prose, chats = held_out(options.num_rows, options.num_chats, options.seed)
    device = torch.device(options.device)
    lines = [
        "| variant | prose | change | answers | change | same first choice | weights (MB) "
        "| KV (bytes per token) |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    counted = [sum(int(text.counts[1:].sum()) for text in texts) for texts in (prose, chats)]
    sizes = f"Perplexity over {counted[0]} tokens of prose and {counted[1]} of answers."
    print(sizes, *lines, sep="\n", flush=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_int4(POCKET_MODEL, folder)
        reference: tuple[Scores, Scores] | None = None
        for variant in VARIANTS:
            model = Model(variant, folder if variant.is_int4 else POCKET_MODEL, device)
            found = model.scores(prose), model.scores(chats)
            reference = reference or found
            lines.append(_row(variant, model, found, reference))
            print(lines[-1], flush=True)
    if options.write:
        text = "\n".join([_NOTE, "", sizes, "", *lines])
        publish("quantization", "quantization", "Quality under 8 and 4 bits", text)


def held_out(num_rows: int, num_chats: int, seed: int) -> tuple[list[Text], list[Text]]:
    """Prose and conversations that the pocket model was not trained on."""
    tokenizer = Tokenizer.from_file(str(POCKET_MODEL / "tokenizer.json"))
    documents = corpus.prose_documents()
    _, aside = corpus.split(documents)
    stream = torch.from_numpy(encode_texts(tokenizer, [each.text for each in aside])).long()
    rows = stream[: len(stream) // ROW_TOKENS * ROW_TOKENS].view(-1, ROW_TOKENS)[:num_rows]
    prose = [Text(row, torch.ones(ROW_TOKENS, dtype=torch.bool)) for row in rows]
    source = ChatSource(seed + 1, corpus.common_words(documents), held_out=True)
    encoded = encode_chats(tokenizer, source, num_chats, texts=False)
    chats = [Text(torch.from_numpy(i).long(), torch.from_numpy(a)) for i, a in encoded]
    return prose, [chat for chat in chats if 1 < len(chat.token_ids) <= 2048]


def _groups(texts: Sequence[Text]) -> Iterator[list[Text]]:
    group: list[Text] = []
    for text in texts:
        if (
            group
            and sum(len(each.token_ids) for each in group) + len(text.token_ids) > BATCH_TOKENS
        ):
            yield group
            group = []
        group.append(text)
    if group:
        yield group


def _batch(group: Sequence[Text], device: torch.device) -> tuple[Batch, int]:
    """All texts as whole prompts, every position sampled; and the blocks they take."""
    lengths = torch.tensor([len(text.token_ids) for text in group])
    counts = (lengths + BLOCK_SIZE - 1) // BLOCK_SIZE
    first = counts.cumsum(0) - counts
    tables = first[:, None] + torch.arange(int(counts.max()))
    positions = torch.cat([torch.arange(int(length)) for length in lengths])
    slots = positions + (first * BLOCK_SIZE).repeat_interleave(lengths)
    batch = Batch(
        token_ids=torch.cat([text.token_ids for text in group]).to(device),
        positions=positions.to(device),
        slot_mapping=slots.to(device),
        samples=None,
        seq_lens=lengths.int().to(device),
        cu_seqlens_q=torch.cat((torch.zeros(1), lengths.cumsum(0))).int().to(device),
        block_tables=tables.int().to(device),
        num_samples=int(lengths.sum()),
        max_seqlen_q=int(lengths.max()),
        is_decode=False,
    )
    # A shorter text's row of the table runs past its blocks, into ones that exist.
    return batch, int(first[-1] + counts.max())


def _row(
    variant: Variant,
    model: Model,
    found: tuple[Scores, Scores],
    reference: tuple[Scores, Scores],
) -> str:
    cells = [variant.name]
    for each, exact in zip(found, reference, strict=True):
        change = 100 * (each.perplexity / exact.perplexity - 1)
        cells += [f"{each.perplexity:.4f}", f"{change:+.2f} %"]
    both = [Scores(*map(torch.cat, ((a.losses, b.losses), (a.choices, b.choices))))
            for a, b in (found, reference)]  # fmt: skip
    cells.append(f"{100 * both[0].agreement(both[1]):.2f} %")
    cells += [f"{model.num_bytes / 1e6:.1f}", str(model.kv_bytes_per_token)]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
