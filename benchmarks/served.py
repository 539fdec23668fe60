"""What benchmarks of a served cluster share: a known shape with dummy weights, the gateway's
policy, and the load. The cluster itself is `serve_process.py`.
"""

from __future__ import annotations

import json
import urllib.request
from typing import TYPE_CHECKING

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from benchmarks.command import parser_of
from benchmarks.model_shapes import SHAPES, write_config
from loadtest.config import BenchConfig
from loadtest.run import run

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from pathlib import Path

    from loadtest.record import RequestRecord

ADMIN_TOKEN = "benchmark"
EVERYTHING = 1 << 30
PROMPT_VOCABULARY = 6000
WARMUPS = 2  # requests


def served_parser(program: str, doc: str | None) -> argparse.ArgumentParser:
    """Options of a program that measures prompts through `baton serve`."""
    parser = parser_of(program, doc)
    parser.add_argument("--shape", default="llama-3.1-8b", choices=SHAPES)
    parser.add_argument("--num-layers", type=int, help="fewer layers, to try the program")
    parser.add_argument("--max-model-len", type=int, default=16384)
    parser.add_argument("--input-len", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("serve", nargs="*", help="more flags for baton serve, after --")
    return parser


def write_model_folder(folder: Path, shape: str, num_layers: int | None) -> None:
    """A model of this shape, and a tokenizer of its vocabulary."""
    write_config(folder, shape, num_layers)
    # Random weights draw any id, and each must have a text: one word for each.
    words = {f"w{token_id}": token_id for token_id in range(int(str(SHAPES[shape]["vocab_size"])))}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")


def set_policy(admin_url: str, **changes: int) -> None:
    request = urllib.request.Request(
        f"{admin_url}/admin/v1/policy",
        method="PATCH",
        data=json.dumps(changes).encode(),
        headers={"Authorization": f"Bearer {ADMIN_TOKEN}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=10):
        pass


def send(
    arguments: argparse.Namespace, url: str, input_len: int, concurrency: int, seed: int
) -> Sequence[RequestRecord]:
    """As many requests as asked for, `concurrency` at once, behind those that warm up."""
    config = BenchConfig(
        base_url=url,
        num_prompts=arguments.num_prompts * concurrency,
        random_input_len=input_len,
        random_output_len=arguments.output_len,
        random_vocab_size=PROMPT_VOCABULARY,
        max_concurrency=concurrency,
        num_warmups=WARMUPS,
        ignore_eos=True,
        temperature=0.0,
        seed=seed,
    )
    return run(config).records
