"""`python -m benchmarks.two_gpus`: the hand-off between two GPUs, beside one node doing both.

1. Write a folder with the config of a known shape and a tokenizer of its vocabulary.
2. Start `baton serve --prefill 1 --decode 1` on it with dummy weights.
3. Send the same load twice: through the split pools, then with the policy set so that the
   decode node prefills everything itself. Prompts differ in each run, so no cache helps.
4. Print both tables, and which transport carried the KV, as `/metrics` names it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import urllib.request
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from benchmarks.model_shapes import SHAPES
from benchmarks.serve_process import ServeProcess
from loadtest.config import BenchConfig
from loadtest.report import render_table
from loadtest.run import run

ADMIN_TOKEN = "benchmark"
EVERYTHING = 1 << 30
PROMPT_VOCABULARY = 6000


def write_model_folder(folder: Path, shape: str, num_layers: int | None) -> None:
    config = dict(SHAPES[shape])
    if num_layers is not None:
        config["num_hidden_layers"] = num_layers
    (folder / "config.json").write_text(json.dumps(config))
    # Random weights draw any id, and each must have a text: one word for each.
    words = {f"w{token_id}": token_id for token_id in range(int(str(config["vocab_size"])))}
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


def transports(url: str) -> list[str]:
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        text = response.read().decode()
    return [line for line in text.splitlines() if line.startswith("baton_kv_transport_info{")]


def measure(arguments: argparse.Namespace, url: str, concurrency: int, seed: int) -> str:
    config = BenchConfig(
        base_url=url,
        num_prompts=arguments.num_prompts * concurrency,
        random_input_len=arguments.input_len,
        random_output_len=arguments.output_len,
        random_vocab_size=PROMPT_VOCABULARY,
        max_concurrency=concurrency,
        num_warmups=2,
        ignore_eos=True,
        temperature=0.0,
        seed=seed,
    )
    return render_table(run(config))


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        write_model_folder(Path(folder), arguments.shape, arguments.num_layers)
        serve = ServeProcess(
            folder,
            "--load-format",
            "dummy",
            "--max-model-len",
            str(arguments.max_model_len),
            "--admin-token",
            ADMIN_TOKEN,
            *arguments.serve,
        )
        with serve:
            print(f"ready in {serve.wait_until_ready():.1f} s", flush=True)
            seed = arguments.seed
            for concurrency in arguments.concurrency:
                for arm, tokens in (("split pools", 0), ("one node doing both", EVERYTHING)):
                    set_policy(serve.admin_url, local_prefill_tokens=tokens)
                    seed += 1
                    print(f"\n{arm}, {concurrency} at once, seed {seed}", flush=True)
                    print(measure(arguments, serve.url, concurrency, seed), flush=True)
            print("\n".join(transports(serve.url)))
            print(serve.log())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llama-3.1-8b", choices=SHAPES)
    parser.add_argument("--num-layers", type=int, help="fewer layers, to try the program")
    parser.add_argument("--max-model-len", type=int, default=16384)
    parser.add_argument("--input-len", type=int, default=2048)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--num-prompts", type=int, default=8, help="per concurrent request")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("serve", nargs="*", help="more flags for baton serve, after --")
    return parser.parse_args()


if __name__ == "__main__":
    main()
