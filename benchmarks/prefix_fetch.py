"""`python -m benchmarks.prefix_fetch`: a prefix from another node's cache, beside computing it.

1. Start `baton serve --prefill 1 --decode 1 --fetch-prefixes` with dummy weights of a known shape.
2. computed  a new prompt through the split pools: time to its first token.
3. fetched   the decode node computes a new prompt itself, as the policy says for a moment, and
             announces it. The same prompt through the split pools is then fetched from there.
4. cached    the same again: the prefill node has it.
Prompts come one at a time. What was fetched is read from the prefill node's metrics.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.model_shapes import SHAPES
from benchmarks.results_file import machine_facts, write_section
from benchmarks.serve_process import ServeProcess
from benchmarks.two_gpus import ADMIN_TOKEN, EVERYTHING, set_policy, write_model_folder

PROMPT_VOCABULARY = 6000
PUBLISH_SECONDS = 2.5  # a heartbeat, and one more
ARMS = ("computed", "fetched", "cached")


def first_token_ms(url: str, model: str, prompt: list[int], num_tokens: int = 2) -> float:
    """Milliseconds to the first token of a stream; reads it to its end."""
    where = urlsplit(url)
    connection = http.client.HTTPConnection(where.hostname or "", where.port or 80, timeout=120)
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": num_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
    }
    began = time.perf_counter()
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"prefix_fetch: {response.status} {response.read()!r}")
    first = None
    for line in response:
        if first is None and line.startswith(b"data:"):
            first = time.perf_counter() - began
    connection.close()
    return 1e3 * (first or 0.0)


def fetched_tokens(admin_url: str) -> float:
    """Tokens that prefill nodes have fetched so far, by their own metrics."""
    request = urllib.request.Request(
        f"{admin_url}/admin/v1/nodes", headers={"Authorization": f"Bearer {ADMIN_TOKEN}"}
    )
    with urllib.request.urlopen(request, timeout=10) as response:
        nodes = json.load(response)
    total = 0.0
    for node in nodes["nodes"]:
        with urllib.request.urlopen(f"http://{node['metrics_address']}/metrics") as response:
            for line in response.read().decode().splitlines():
                if line.startswith("baton_prefix_fetched_tokens_total"):
                    total += float(line.rpartition(" ")[2])
    return total


def measure(serve: ServeProcess, model: str, length: int, repeats: int, seed: int) -> str:
    """One row: medians of each arm, and how many of the tokens were fetched."""
    draw = random.Random(seed)
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    before = fetched_tokens(serve.admin_url)
    for turn in range(repeats + 1):
        new, there = ([draw.randrange(PROMPT_VOCABULARY) for _ in range(length)] for _ in "ab")
        computed = first_token_ms(serve.url, model, new)
        set_policy(serve.admin_url, local_prefill_tokens=EVERYTHING)
        first_token_ms(serve.url, model, there, num_tokens=1)
        set_policy(serve.admin_url, local_prefill_tokens=0)
        time.sleep(PUBLISH_SECONDS)
        fetched = first_token_ms(serve.url, model, there)
        time.sleep(PUBLISH_SECONDS)
        cached = first_token_ms(serve.url, model, there)
        if turn:  # the first warms up
            for arm, milliseconds in zip(ARMS, (computed, fetched, cached), strict=True):
                times[arm].append(milliseconds)
    num_fetched = fetched_tokens(serve.admin_url) - before
    computed, fetched, cached = (statistics.median(times[arm]) for arm in ARMS)
    return (
        f"| {length} | {computed:.1f} | {fetched:.1f} | {cached:.1f} | {computed / fetched:.1f} "
        f"| {num_fetched:.0f} of {length * (repeats + 1)} |"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.prefix_fetch", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--shape", default="llama-3.1-8b", choices=SHAPES)
    parser.add_argument("--num-layers", type=int, help="fewer layers, to try the program")
    parser.add_argument("--input-len", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="update benchmarks/RESULTS.md")
    parser.add_argument("serve", nargs="*", help="more flags for baton serve, after --")
    arguments = parser.parse_args(argv)
    rows = [
        "| prompt | computed (ms) | fetched (ms) | cached (ms) | computed / fetched | fetched |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        write_model_folder(Path(folder), arguments.shape, arguments.num_layers)
        options = ["--load-format", "dummy", "--admin-token", ADMIN_TOKEN, "--fetch-prefixes"]
        options += ["--max-model-len", str(max(arguments.input_len) + 1024), *arguments.serve]
        with ServeProcess(folder, *options) as serve:
            serve.wait_until_ready()
            model = Path(folder).name
            for length in arguments.input_len:
                rows.append(measure(serve, model, length, arguments.repeats, arguments.seed))
                print(rows[-1], flush=True)
            print(serve.log())
    print("\n".join(rows))
    if arguments.write:
        command = " ".join(["python -m benchmarks.prefix_fetch", *(argv or sys.argv[1:])])
        facts = [f"- {fact}" for fact in (f"command: `{command}`", *machine_facts())]
        write_section("prefix_fetch", "A prefix from another node", "\n".join([*rows, "", *facts]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
