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
from itertools import product
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


def metrics(url: str, name: str) -> list[str]:
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        text = response.read().decode()
    return [line for line in text.splitlines() if line.startswith(name)]


class HandoffGaps:
    """Means of the gap between first and second token, which the gateway sums up."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._sum, self._count = self._read()

    def mean_ms(self) -> float | None:
        """Since asked last; None when nothing was handed off."""
        total, count = self._read()
        spent, number = total - self._sum, count - self._count
        self._sum, self._count = total, count
        return spent / number * 1e3 if number else None

    def _read(self) -> tuple[float, float]:
        found = []
        for part in ("sum", "count"):
            lines = metrics(self._url, f"baton_handoff_gap_seconds_{part}")
            found.append(sum(float(line.rpartition(" ")[2]) for line in lines))
        return found[0], found[1]


def measure(
    arguments: argparse.Namespace, url: str, input_len: int, concurrency: int, seed: int
) -> str:
    config = BenchConfig(
        base_url=url,
        num_prompts=arguments.num_prompts * concurrency,
        random_input_len=input_len,
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
            seed, gaps = arguments.seed, HandoffGaps(serve.url)
            for input_len, concurrency in product(arguments.input_len, arguments.concurrency):
                for arm, tokens in (("split pools", 0), ("one node doing both", EVERYTHING)):
                    set_policy(serve.admin_url, local_prefill_tokens=tokens)
                    seed += 1
                    load = f"{input_len} tokens, {concurrency} at once, seed {seed}"
                    print(f"\n{arm}, {load}", flush=True)
                    print(measure(arguments, serve.url, input_len, concurrency, seed), flush=True)
                    mean = gaps.mean_ms()
                    if mean is not None:
                        print(f"mean gap between first and second token: {mean:.2f} ms")
            print("\n".join(metrics(serve.url, "baton_kv_transport_info{")))
            print(serve.log())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llama-3.1-8b", choices=SHAPES)
    parser.add_argument("--num-layers", type=int, help="fewer layers, to try the program")
    parser.add_argument("--max-model-len", type=int, default=16384)
    parser.add_argument("--input-len", type=int, nargs="+", default=[2048])
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--num-prompts", type=int, default=8, help="per concurrent request")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("serve", nargs="*", help="more flags for baton serve, after --")
    return parser.parse_args()


if __name__ == "__main__":
    main()
