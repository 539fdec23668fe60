"""`python -m benchmarks.engine --shape llama-3.1-8b`: what one step costs on this GPU.

    1. Write the config.json of the shape to a temporary folder; the weights are dummies.
    2. Measure the copy bandwidth of this GPU and its rate at a large matrix product: the limits.
    3. Prefill alone: one prompt in one step, at each length. Prompts never repeat.
    4. Decode alone: steps of n sequences with a given context, through the captured graphs.
    5. Print each figure beside its floor: (weights + KV read) / bandwidth, or FLOP / rate.

Times are of whole `Engine.step` calls, sampling and the read of the drawn tokens included.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cluster.prefix_hash import root_hash
from cluster.request import SamplingParams, SequenceRequest
from cluster.startup import StartupReport
from engine.config import EngineConfig
from engine.engine import Engine
from engine.schedule import ScheduledChunk, ScheduleDecision
from engine.sequence import Sequence
from loadtest.metadata import collect_metadata

if TYPE_CHECKING:
    from collections.abc import Callable

_LLAMA = {"architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-05, "torch_dtype": "bfloat16"}
SHAPES: dict[str, dict[str, object]] = {
    "llama-3.1-8b": _LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "llama-3.2-1b": _LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "qwen3-0.6b": _LLAMA
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    },
}
_names = itertools.count()


@dataclass(frozen=True, slots=True)
class Limits:
    """What this device reaches in the simplest program: bytes and FLOP per second."""

    copy_bandwidth: float
    matmul_rate: float


@dataclass(frozen=True, slots=True)
class Figure:
    """Milliseconds of one step, beside the least the limits allow."""

    name: str
    median_ms: float
    p99_ms: float
    floor_ms: float

    def line(self) -> str:
        share = self.floor_ms / self.median_ms
        return (
            f"{self.name:<36} {self.median_ms:>9.3f} {self.p99_ms:>9.3f} "
            f"{self.floor_ms:>9.3f} {share:>7.1%}"
        )


def measure_limits(device: torch.device) -> Limits:
    return Limits(_copy_bandwidth(device), _matmul_rate(device))


def _copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a copy of 2 GiB."""
    source = torch.empty(1 << 30, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source))


def _matmul_rate(device: torch.device) -> float:
    """FLOP per second of an 8192-cubed product; of random numbers, since zeros run faster."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=device) for _ in range(2))
    return 2 * 8192**3 / _seconds(lambda: torch.mm(a, b))


def _seconds(run: Callable[[], object], repeats: int = 20) -> float:
    for _ in range(3):
        run()
    times: list[float] = []
    for _ in range(repeats):
        begin, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def new_sequence(engine: Engine, num_tokens: int) -> Sequence:
    """A prompt that no earlier one begins like."""
    number = next(_names)
    generator = torch.Generator().manual_seed(number)
    prompt = torch.randint(0, engine.model_config.vocab_size, (num_tokens,), generator=generator)
    request = SequenceRequest(
        sequence_id=f"s{number}",
        request_id=f"r{number}",
        prompt_token_ids=tuple(prompt.tolist()),
        sampling=SamplingParams(max_tokens=1 << 20, seed=0, temperature=0.0, ignore_eos=True),
    )
    return Sequence(request, block_size=engine.config.block_size, root=root_hash("bench", b""))


def timed_step(engine: Engine, chunks: list[tuple[Sequence, int]]) -> float:
    for sequence, length in chunks:
        if not engine.block_manager.allocate(sequence, sequence.num_computed_tokens + length):
            raise SystemExit("The KV pool is too small for this benchmark.")
    decision = ScheduleDecision(tuple(ScheduledChunk(*chunk) for chunk in chunks))
    begin = time.perf_counter()
    engine.step(decision)
    return time.perf_counter() - begin


def prefill(engine: Engine, num_tokens: int, limits: Limits, repeats: int) -> Figure:
    times = []
    for _ in range(repeats + 2):
        sequence = new_sequence(engine, num_tokens)
        times.append(timed_step(engine, [(sequence, num_tokens)]))
        engine.block_manager.free(sequence)
    model = engine.model_config
    embeddings = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    matrices = 2 * (model.num_parameters - embeddings) * num_tokens
    attention = 2 * num_tokens**2 * model.num_heads * model.head_size * model.num_layers
    return _figure(f"prefill {num_tokens}", times[2:], (matrices + attention) / limits.matmul_rate)


def decode(engine: Engine, num_seqs: int, context: int, limits: Limits, steps: int) -> Figure:
    sequences = [new_sequence(engine, context) for _ in range(num_seqs)]
    budget = engine.max_num_batched_tokens
    for sequence in sequences:
        while sequence.num_output_tokens == 0:
            timed_step(engine, [(sequence, min(budget, sequence.num_uncomputed_tokens))])
    times = [timed_step(engine, [(each, 1) for each in sequences]) for _ in range(steps + 5)]
    model, layout = engine.model_config, engine.kv_cache.layout
    # Every weight is read but the input embedding, of which a step reads one row per sequence.
    unread = 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size
    weights = (model.num_parameters - unread) * layout.dtype.itemsize
    kv = sum(each.num_tokens for each in sequences) * layout.block_bytes / layout.block_size
    for sequence in sequences:
        engine.block_manager.free(sequence)
    name = f"decode batch {num_seqs}, context {context}"
    return _figure(name, times[5:], (weights + kv) / limits.copy_bandwidth)


def _figure(name: str, seconds: list[float], floor_seconds: float) -> Figure:
    ordered = sorted(seconds)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return Figure(name, 1e3 * statistics.median(ordered), 1e3 * p99, 1e3 * floor_seconds)


def open_engine(arguments: argparse.Namespace, folder: Path) -> Engine:
    (folder / "config.json").write_text(json.dumps(SHAPES[arguments.shape]))
    config = EngineConfig(
        model=folder,
        load_format="dummy",
        device="cuda",
        max_model_len=arguments.max_model_len,
        max_num_seqs=max(arguments.batch),
        max_num_batched_tokens=max(arguments.prefill),
        enforce_eager=arguments.enforce_eager,
        enable_prefix_caching=False,
    )
    return Engine.create(config, progress=StartupReport())


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the steps of one engine on this GPU.")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--prefill", type=int, nargs="+", default=[2048, 8192], metavar="TOKENS")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 128], metavar="SEQUENCES")
    parser.add_argument("--context", type=int, nargs="+", default=[1024], metavar="TOKENS")
    parser.add_argument("--steps", type=int, default=200, help="timed decode steps of each row")
    parser.add_argument("--repeats", type=int, default=5, help="timed prefills of each length")
    parser.add_argument("--max-model-len", type=int, default=16384)
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--json", type=Path, help="also write figures and metadata to this file")
    return parser.parse_args()


def main() -> None:
    arguments = read_arguments()
    device = torch.device("cuda", 0)
    limits = measure_limits(device)
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        engine = open_engine(arguments, Path(folder))
        figures = [prefill(engine, n, limits, arguments.repeats) for n in arguments.prefill]
        figures += [
            decode(engine, num_seqs, context, limits, arguments.steps)
            for context in arguments.context
            for num_seqs in arguments.batch
        ]
    metadata = collect_metadata().as_dict()
    print(json.dumps(metadata, indent=1))
    print(f"{arguments.shape}, {engine.kv_cache.num_blocks} blocks of {engine.config.block_size}")
    print(
        f"limits: copy {limits.copy_bandwidth / 1e12:.2f} TB/s, "
        f"product {limits.matmul_rate / 1e12:.0f} TFLOP/s"
    )
    print(f"{'step':<36} {'median ms':>9} {'p99 ms':>9} {'floor ms':>9} {'share':>7}")
    for figure in figures:
        print(figure.line())
    if arguments.json is not None:
        rows = [{"name": f.name, "ms": f.median_ms, "floor_ms": f.floor_ms} for f in figures]
        arguments.json.write_text(json.dumps({"metadata": metadata, "figures": rows}, indent=1))


if __name__ == "__main__":
    main()
