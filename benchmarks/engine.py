"""`python -m benchmarks.engine --shape llama-3.1-8b`: what one engine reaches on this GPU.

    1. Write the config.json of the shape to a temporary folder; the weights are dummies, checked
       to compute like a model's.
    2. Measure the copy bandwidth of this GPU and its rate at a large matrix product: the limits.
    3. Time to first token of lone prompts; longer ones run in chunks, as on a node.
    4. Decode alone: the time from one step's tokens to the next's, of n sequences.
    5. Each figure stands beside its floors (`floors.py`), and beside the peer's where one was
       measured on the same hardware and shape.

The engine is driven by its loop and a scheduler: sampling and host work are part of every time.
`--write` puts the table and the run's metadata into benchmarks/RESULTS.md.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.command import command_of, parser_of, with_facts
from benchmarks.engine_run import EngineRun
from benchmarks.floors import Floors
from benchmarks.kernels.ceilings import Ceilings, measure_ceilings, pinned_copy_rate
from benchmarks.model_shapes import SHAPES, write_config
from benchmarks.results_file import write_section
from cluster.startup import StartupReport
from engine.config import EngineConfig
from engine.engine import Engine
from loadtest.metadata import collect_metadata

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence


# Milliseconds, vLLM 0.25.1 with FlashAttention 3, one H200, bfloat16.
PEER = "vLLM 0.25.1"
PEERS = {
    ("llama-3.1-8b", "prefill 2048"): 54.0,
    ("llama-3.1-8b", "prefill 8192"): 216.6,
    ("llama-3.1-8b", "prefill 32768"): 1202.6,
    ("llama-3.1-8b", "decode 1 x 1024"): 4.87,
}
COLUMNS = (
    *("figure", "median (ms)", "p99 (ms)", "floor (ms)", "over the floor"),
    *("floor by product (ms)", "over it", "peer (ms)", "of the peer", "GPU idle"),
)
FLOORS = (
    "floor: of a prompt its FLOP at the rate of the product, of a decode step all weights and KV "
    "at that of the copy",
    "floor by product: of a decode step, for each product the larger of its weights at the rate "
    "of the copy and its FLOP at that of the product, which binds larger batches; and the KV as "
    "before. None for weights of float8: the rate was measured in bfloat16",
)
HEAD = f"| {' | '.join(COLUMNS)} |\n|---|{'---:|' * (len(COLUMNS) - 1)}"


@dataclass(frozen=True, slots=True)
class Figure:
    """Milliseconds. floor_ms: the least the limits allow, product_floor_ms: for each product, see
    `floors.py`. peer_ms, product_floor_ms: 0 where there is none.
    idle_share: of a decode step, in which the GPU waits for the host."""

    name: str
    median_ms: float
    p99_ms: float
    floor_ms: float
    product_floor_ms: float
    peer_ms: float
    idle_share: float | None

    def line(self) -> str:
        cells = [
            self.name,
            f"{self.median_ms:.2f}",
            f"{self.p99_ms:.2f}",
            f"{self.floor_ms:.2f}",
            f"{self.median_ms / self.floor_ms:.2f}x",
            *self._beside(self.product_floor_ms),
            *self._beside(self.peer_ms),
            f"{self.idle_share:.1%}" if self.idle_share is not None else "",
        ]
        return "| " + " | ".join(cells) + " |"

    def _beside(self, other_ms: float) -> tuple[str, str]:
        if not other_ms:
            return "", ""
        return f"{other_ms:.2f}", f"{self.median_ms / other_ms:.2f}x"


class Measurement:
    """The figures of one engine."""

    def __init__(
        self,
        run: EngineRun,
        ceilings: Ceilings,
        arguments: argparse.Namespace,
        fetch_seconds: float,
    ) -> None:
        """`fetch_seconds`: what a step takes at least to fetch offloaded layers; 0 without."""
        self.contexts: dict[str, int] = {}  # of decode: the mean of what the steps attended to
        self._run = run
        self._fetch_seconds = fetch_seconds
        self._floors = Floors.of(run.engine, ceilings)
        self._arguments = arguments
        # Peers were measured in bfloat16, without offload, on one GPU.
        self._has_peers = not any(
            (arguments.quantization, arguments.kv_cache_dtype != "auto", arguments.cpu_offload_gb)
        )

    def prefill(self, num_tokens: int) -> Figure:
        repeats = self._arguments.repeats
        times = [self._run.first_token_seconds(num_tokens) for _ in range(repeats + 2)][2:]
        num_steps = -(-num_tokens // self._arguments.chunk)
        floor = max(self._floors.prefill(num_tokens), num_steps * self._fetch_seconds)
        return self._figure(f"prefill {num_tokens}", times, floor)

    def decode(self, num_seqs: int, context: int) -> Figure:
        steps = self._arguments.steps
        times = self._run.decode(num_seqs, context, steps)
        # The first prompts decode while the last are prefilled: contexts are longer than asked.
        floor = max(self._floors.decode_by_bytes(num_seqs, times.context), self._fetch_seconds)
        by_product = self._floors.decode_by_product(num_seqs, times.context)
        product_floor = None if by_product is None else max(by_product, self._fetch_seconds)
        name = f"decode {num_seqs} x {context}"
        self.contexts[name] = round(times.context)
        return self._figure(name, times.steps, floor, product_floor, times.idle_share)

    def _figure(
        self,
        name: str,
        seconds: Sequence[float],
        floor_seconds: float,
        product_floor_seconds: float | None = None,
        idle_share: float | None = None,
    ) -> Figure:
        ordered = sorted(1e3 * each for each in seconds)
        figure = Figure(
            name=name,
            median_ms=statistics.median(ordered),
            p99_ms=ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
            floor_ms=1e3 * floor_seconds,
            product_floor_ms=1e3 * (product_floor_seconds or 0.0),
            peer_ms=PEERS.get((self._arguments.shape, name), 0.0) if self._has_peers else 0.0,
            idle_share=idle_share,
        )
        print(figure.line(), flush=True)
        return figure


def open_engine(arguments: argparse.Namespace, folder: Path) -> Engine:
    write_config(folder, arguments.shape)
    longest = max(max(arguments.prefill), max(arguments.context) + arguments.steps + 256)
    config = EngineConfig(
        model=folder,
        load_format="dummy",
        device="cuda",
        seed=arguments.seed,
        max_model_len=arguments.max_model_len or longest + 256,
        max_num_seqs=max(arguments.batch),
        max_num_batched_tokens=arguments.chunk,
        enforce_eager=arguments.enforce_eager,
        quantization=arguments.quantization,
        kv_cache_dtype=arguments.kv_cache_dtype,
        cpu_offload_gb=arguments.cpu_offload_gb,
        enable_prefix_caching=False,
    )
    return Engine.create(config, progress=StartupReport(sink=lambda fact: None))


def parse() -> argparse.Namespace:
    parser = parser_of("engine", __doc__)
    add = parser.add_argument
    add("--shape", choices=sorted(SHAPES), default="llama-3.1-8b")
    add("--prefill", type=int, nargs="+", default=[2048, 8192, 32768], metavar="TOKENS")
    add("--batch", type=int, nargs="+", default=[1, 32, 128, 256], metavar="SEQUENCES")
    add("--context", type=int, nargs="+", default=[1024], metavar="TOKENS")
    add("--chunk", type=int, default=8192, help="most tokens of one step")
    add("--steps", type=int, default=200, help="timed decode steps of each row")
    add("--repeats", type=int, default=5, help="timed prefills of each length")
    add("--max-model-len", type=int)
    add("--quantization")
    add("--kv-cache-dtype", default="auto")
    add("--cpu-offload-gb", type=float, default=0.0)
    add("--enforce-eager", action="store_true")
    add("--seed", type=int, default=0)
    add("--json", type=Path, help="also write figures and metadata to this file")
    return parser.parse_args()


def measure(
    arguments: argparse.Namespace, ceilings: Ceilings, folder: Path
) -> tuple[list[Figure], list[str]]:
    engine = open_engine(arguments, folder)
    facts = [f"{engine.kv_cache.num_blocks} blocks of {engine.config.block_size} tokens"]
    print(HEAD, flush=True)
    with EngineRun(engine, arguments.seed) as run:
        facts.append(f"dummy weights: {run.check_is_realistic(min(32, engine.max_num_seqs))}")
        fetch_seconds = 0.0
        offloaded = engine._runner._decoder.offloaded
        if offloaded is not None:
            rate = pinned_copy_rate()
            fetch_seconds = offloaded.host_bytes / rate
            facts += [f"offloaded {offloaded.shown()}", f"pinned copy: {rate / 1e9:.1f} GB/s"]
        measurement = Measurement(run, ceilings, arguments, fetch_seconds)
        figures = [measurement.prefill(num_tokens) for num_tokens in arguments.prefill]
        for context in arguments.context:
            figures += [measurement.decode(num_seqs, context) for num_seqs in arguments.batch]
        means = ", ".join(f"{name}: {mean}" for name, mean in measurement.contexts.items())
        facts.append(f"mean context of the timed steps, which the floors count: {means}")
    return figures, facts


def main() -> int:
    arguments = parse()
    ceilings = measure_ceilings()
    with tempfile.TemporaryDirectory() as folder:
        figures, facts = measure(arguments, ceilings, Path(folder))
    facts = [f"limits: {ceilings.line()}", *facts]
    facts.append(f"peer: {PEER}, one H200, bfloat16, measured on another day")
    facts += FLOORS
    facts.append("GPU idle: share of a step beyond what its graphs take alone, run back to back")
    table = "\n".join([HEAD, *(figure.line() for figure in figures)])
    text = with_facts("engine", table, facts)
    print(text)
    if arguments.json is not None:
        record = {
            "metadata": collect_metadata().as_dict(),
            "command": command_of("engine"),
            "ceilings": asdict(ceilings),
            "figures": [asdict(figure) for figure in figures],
            "facts": facts,
        }
        arguments.json.write_text(json.dumps(record, indent=1))
    if arguments.write:
        write_section(*section_of(arguments), text)
    return 0


def section_of(arguments: argparse.Namespace) -> tuple[str, str]:
    """Name and title of the section for this kind of engine."""
    parts = [arguments.shape]
    if arguments.quantization:
        parts.append(f"weights {arguments.quantization}")
    if arguments.kv_cache_dtype != "auto":
        parts.append(f"KV {arguments.kv_cache_dtype}")
    if arguments.cpu_offload_gb:
        parts.append(f"{arguments.cpu_offload_gb:g} GiB offloaded")
    return f"engine {' '.join(parts)}", f"One engine on one GPU: {', '.join(parts)}"


if __name__ == "__main__":
    sys.exit(main())
