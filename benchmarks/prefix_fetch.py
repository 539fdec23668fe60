"""`python -m benchmarks.prefix_fetch`: a prefix from another node's cache, beside computing it.

1. Start `baton serve --prefill 1 --decode 1 --fetch-prefixes` with dummy weights of a known shape.
2. computed  a new prompt through the split pools: time to its first token.
3. fetched   the decode node computes a new prompt itself, as the policy says for a moment, and
             announces it. The same prompt through the split pools is then fetched from there.
4. cached    the same again: the prefill node has it.
5. restored  with `--host-gib`: as `fetched`, but before it the decode node computes others until
             its small pool has nothing of it. It is fetched out of the node's host memory.
Prompts come one at a time. What was fetched and restored, and how many prompts waited for that, is
read from the nodes' metrics: only what was waited for can be sooner. The first turn, which is not
timed, counts there: in it two nodes meet, and nobody waits.
"""

from __future__ import annotations

import http.client
import json
import random
import statistics
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from benchmarks.command import parser_of, publish
from benchmarks.model_shapes import SHAPES
from benchmarks.serve_process import ServeProcess
from benchmarks.served import (
    ADMIN_TOKEN,
    EVERYTHING,
    PROMPT_VOCABULARY,
    set_policy,
    write_model_folder,
)

if TYPE_CHECKING:
    import argparse

PUBLISH_SECONDS = 2.5  # a heartbeat, and one more
BLOCK_SIZE = 16
POOL_PROMPTS = 3  # of the longest, in a pool that is to be left
ARMS = ("computed", "fetched", "cached", "restored")
FETCHED = "baton_prefix_fetched_tokens_total"
WAITED_SECONDS = "baton_prefix_fetch_wait_seconds_total"
OUTCOMES = ("waited", "explored", "not_worthwhile", "failed")
RESTORED = 'baton_host_kv_given_blocks_total{outcome="restored"}'


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


def counted(admin_url: str, name: str) -> float:
    """The sum of a counter over all nodes, by their own metrics."""
    request = urllib.request.Request(
        f"{admin_url}/admin/v1/nodes", headers={"Authorization": f"Bearer {ADMIN_TOKEN}"}
    )
    with urllib.request.urlopen(request, timeout=10) as response:
        nodes = json.load(response)
    total = 0.0
    for node in nodes["nodes"]:
        with urllib.request.urlopen(f"http://{node['metrics_address']}/metrics") as response:
            for line in response.read().decode().splitlines():
                if line.startswith(name):
                    total += float(line.rpartition(" ")[2])
    return total


def outcome(name: str) -> str:
    """The counter of prompts of which another node had more."""
    return f'baton_prefix_fetches_total{{outcome="{name}"}}'


class Turns:
    """The arms with prompts of one length. `pool_tokens`: of a pool below which is host memory; 0:
    there is none, and no arm `restored`."""

    def __init__(self, serve: ServeProcess, model: str, length: int, pool_tokens: int) -> None:
        self._serve = serve
        self._model = model
        self._length = length
        self._pool_tokens = pool_tokens
        self.times: dict[str, list[float]] = {}

    def run(self, draw: random.Random, *, is_warm: bool) -> None:
        """One prompt through each arm."""
        times = {"computed": self._ask(self._prompt(draw))}
        there = self._prompt(draw)
        self._compute_there([there])
        times["fetched"] = self._ask(there)
        time.sleep(PUBLISH_SECONDS)
        times["cached"] = self._ask(there)
        if self._pool_tokens:
            left = self._prompt(draw)
            num_others = -(-self._pool_tokens // self._length)
            self._compute_there([left, *(self._prompt(draw) for _ in range(num_others))])
            times["restored"] = self._ask(left)
        for arm, milliseconds in times.items() if is_warm else ():
            self.times.setdefault(arm, []).append(milliseconds)

    def _compute_there(self, prompts: list[list[int]]) -> None:
        """On the decode node, which then announces them."""
        set_policy(self._serve.admin_url, local_prefill_tokens=EVERYTHING)
        for prompt in prompts:
            self._ask(prompt, num_tokens=1)
        set_policy(self._serve.admin_url, local_prefill_tokens=0)
        time.sleep(PUBLISH_SECONDS)

    def _ask(self, prompt: list[int], num_tokens: int = 2) -> float:
        return first_token_ms(self._serve.url, self._model, prompt, num_tokens)

    def _prompt(self, draw: random.Random) -> list[int]:
        return [draw.randrange(PROMPT_VOCABULARY) for _ in range(self._length)]


def measure(turns: Turns, serve: ServeProcess, length: int, repeats: int, seed: int) -> str:
    """One row: medians of each arm, how many of the tokens were fetched and restored, and what
    became of the prompts of which the other node had more."""
    draw = random.Random(f"{seed}, {length}")  # else short prompts would begin long ones
    names = (FETCHED, RESTORED, WAITED_SECONDS, *map(outcome, OUTCOMES))
    before = [counted(serve.admin_url, name) for name in names]
    for turn in range(repeats + 1):
        turns.run(draw, is_warm=turn > 0)  # the first warms up
    after = [counted(serve.admin_url, name) for name in names]
    fetched, restored, seconds, *outcomes = (b - a for a, b in zip(before, after, strict=True))
    medians = {arm: statistics.median(times) for arm, times in turns.times.items()}
    cells = [f"{medians[arm]:.1f}" if arm in medians else "-" for arm in ARMS]
    asked = length * (repeats + 1)
    ratio = medians["computed"] / medians["fetched"]
    moved = f"{fetched:.0f}, {restored * BLOCK_SIZE:.0f} of {asked}"
    became = ", ".join(f"{count:.0f}" for count in outcomes)
    wait = f"{1e3 * seconds / outcomes[0]:.1f}" if outcomes[0] else "-"
    return f"| {length} | {' | '.join(cells)} | {ratio:.1f} | {wait} | {moved} | {became} |"


def serve_options(arguments: argparse.Namespace, pool_tokens: int) -> list[str]:
    options = ["--load-format", "dummy", "--admin-token", ADMIN_TOKEN, "--fetch-prefixes"]
    options += ["--max-model-len", str(max(arguments.input_len) + 1024)]
    if pool_tokens:
        options += ["--kv-offloading-size", str(arguments.host_gib)]
        options += ["--num-gpu-blocks-override", str(pool_tokens // BLOCK_SIZE)]
    return [*options, *arguments.serve]


def main() -> int:
    parser = parser_of("prefix_fetch", __doc__)
    parser.add_argument("--shape", default="llama-3.1-8b", choices=SHAPES)
    parser.add_argument("--num-layers", type=int, help="fewer layers, to try the program")
    parser.add_argument("--input-len", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument(
        "--host-gib", type=float, default=0.0, help="host memory of each node; 0: no arm `restored`"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("serve", nargs="*", help="more flags for baton serve, after --")
    arguments = parser.parse_args()
    pool_tokens = POOL_PROMPTS * (max(arguments.input_len) + 1024) if arguments.host_gib else 0
    rows = [
        "| prompt | computed (ms) | fetched (ms) | cached (ms) | restored (ms) "
        "| computed / fetched | a prompt waited (ms) | tokens fetched, restored "
        "| prompts that waited, explored, not worthwhile, failed |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        write_model_folder(Path(folder), arguments.shape, arguments.num_layers)
        with ServeProcess(folder, *serve_options(arguments, pool_tokens)) as serve:
            serve.wait_until_ready()
            for length in arguments.input_len:
                turns = Turns(serve, Path(folder).name, length, pool_tokens)
                row = measure(turns, serve, length, arguments.repeats, arguments.seed)
                rows.append(row)
                print(row, flush=True)
            print(serve.log())
    print("\n".join(rows))
    if arguments.write:
        publish("prefix_fetch", "prefix_fetch", "A prefix from another node", "\n".join(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
