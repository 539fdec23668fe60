"""`python -m benchmarks.forward_profile --prefill 2048 8192 --decode 1 32`: the kernels of a pass.

    1. Build a model of the shape with random weights, and a pool with scrambled blocks.
    2. Each pass alone, without scheduler or sampling: the median of its time. Decode replays a
       captured graph, as the engine does; prefill is queued kernel by kernel.
    3. The same pass once under torch's profiler: each kernel's calls and time.

`--fp8`: weights and KV in float8.

Times of kernels in a profile do not add up to that of the pass: what lies between them is missing,
and chained kernels overlap. `--write` puts the tables into benchmarks/RESULTS.md.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.command import parser_of, publish
from benchmarks.model_shapes import SHAPES, write_config
from engine.batch import Batch, Samples, table_width
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.quantization import ON_LOAD
from engine.models.quantized_linear import matrix_factory
from kernels.attention_backend import Facts, fastest

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from engine.tensor_parallel.ranks import Ranks

BLOCK_SIZE = 16
DEVICE, DTYPE, FLOAT8 = torch.device("cuda"), torch.bfloat16, torch.float8_e4m3fn
SHOWN_KERNELS, NAME_LENGTH = 12, 56
REPEATS = 15


class Model:
    """A decoder with random weights over a pool for `num_tokens` tokens; with `ranks`, this rank's
    shard of one."""

    def __init__(
        self, shape: str, num_tokens: int, max_model_len: int, ranks: Ranks | None = None, *,
        is_fp8: bool = False,
    ) -> None:  # fmt: skip
        self.config = config_of(shape)
        if ranks is not None:
            self.config = ranks.shard.of_model(self.config)
        kv_dtype = FLOAT8 if is_fp8 else DTYPE
        self.decoder = Decoder(
            self.config, max_model_len=max_model_len, dtype=DTYPE, device=DEVICE, ranks=ranks,
            kv_dtype=kv_dtype,
            make_matrix=matrix_factory(
                ON_LOAD if is_fp8 else None, frozenset(), dtype=DTYPE, device=DEVICE
            ),
            attention_backend=fastest(
                Facts(torch.cuda.get_device_capability(DEVICE), DTYPE, self.config.head_size)
            ),
        )  # fmt: skip
        for name, view in self.decoder.checkpoint_views().items():
            _fill(name, view)
        self.decoder.pack()
        self.num_blocks = num_tokens // BLOCK_SIZE + 1
        heads, size = self.config.num_kv_heads, self.config.head_size
        self.kv_layers = [
            torch.randn(self.num_blocks, 2, heads, BLOCK_SIZE, size, device=DEVICE).to(kv_dtype)
            for _ in range(self.config.num_layers)
        ]

    def run(self, batch: Batch) -> torch.Tensor:
        hidden = self.decoder.forward(batch, self.kv_layers)
        if hidden is None:
            raise RuntimeError("a batch of this program samples")
        return self.decoder.logits(hidden)

    def prefill(self, num_tokens: int, cached: int = 0) -> Batch:
        """The last tokens of one prompt, behind `cached` ones."""
        length = cached + num_tokens
        positions = torch.arange(cached, length, device=DEVICE)
        return self._batch(1, length, positions[None], is_decode=False)

    def decode(self, num_seqs: int, context: int) -> Batch:
        positions = torch.full((num_seqs, 1), context - 1, device=DEVICE)
        return self._batch(num_seqs, context, positions, is_decode=True)

    def _batch(self, num_seqs: int, length: int, positions: torch.Tensor, is_decode: bool) -> Batch:
        """`positions`: `[num_seqs, query tokens]`, the last ones of sequences of `length`."""
        num_blocks = -(-length // BLOCK_SIZE)
        blocks = torch.randperm(self.num_blocks, device=DEVICE)[: num_seqs * num_blocks]
        tables = torch.zeros(num_seqs, table_width(num_blocks), dtype=torch.int32, device=DEVICE)
        tables[:, :num_blocks] = blocks.view(num_seqs, num_blocks)
        slots = tables.gather(1, positions // BLOCK_SIZE).long() * BLOCK_SIZE
        slots += positions % BLOCK_SIZE
        num_tokens, query_len = positions.numel(), positions.shape[1]
        starts = torch.arange(num_seqs + 1, device=DEVICE) * query_len
        vocab_size = self.config.vocab_size
        return Batch(
            token_ids=torch.randint(0, vocab_size, (num_tokens,), device=DEVICE),
            positions=positions.flatten(),
            slot_mapping=slots.flatten(),
            samples=None
            if is_decode
            else Samples(starts[1:] - 1, torch.arange(num_seqs, device=DEVICE)),
            seq_lens=torch.full((num_seqs,), length, dtype=torch.int32, device=DEVICE),
            cu_seqlens_q=starts.int(),
            block_tables=tables,
            num_samples=num_seqs,
            max_seqlen_q=query_len,
            is_decode=is_decode,
        )


def _fill(name: str, view: torch.Tensor) -> None:
    """Weights of a deviation of 0.02."""
    if view.dtype == FLOAT8:
        view.copy_(torch.randn(view.shape, device=DEVICE).mul_(40.0))
    elif name.endswith("weight_scale"):
        view.fill_(0.02 / 40.0)
    elif name.endswith(("norm.weight", "_scale")):
        view.fill_(1.0)
    else:
        view.normal_(0.0, 0.02)


def config_of(shape: str) -> ModelConfig:
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), shape)
        return ModelConfig.from_folder(Path(folder))


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """Replays of a graph of `run`."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph.replay


def median_ms(run: Callable[[], object]) -> float:
    begin, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
    samples = []
    run()
    for _ in range(REPEATS):
        begin.record()
        run()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end))
    return statistics.median(samples)


def kernel_lines(run: Callable[[], object]) -> list[str]:
    """`| kernel | calls | us each | ms |` of one run, the longest first."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    calls: dict[str, int] = defaultdict(int)
    micros: dict[str, float] = defaultdict(float)
    for event in recorded.events() or ():
        if event.device_time > 0:
            calls[event.name] += 1
            micros[event.name] += event.device_time
    names = sorted(micros, key=lambda name: -micros[name])
    lines = [
        f"| {name[:NAME_LENGTH]} | {calls[name]} | {micros[name] / calls[name]:.1f} | "
        f"{micros[name] / 1e3:.2f} |"
        for name in names[:SHOWN_KERNELS]
    ]
    return [*lines, f"| all {sum(calls.values())} | | | {sum(micros.values()) / 1e3:.2f} |"]


def section(title: str, run: Callable[[], object], milliseconds: float) -> str:
    head = ["| kernel | calls | us each | ms |", "|---|---:|---:|---:|"]
    return "\n".join([f"{title}: {milliseconds:.2f} ms", "", *head, *kernel_lines(run), ""])


def measure(arguments: argparse.Namespace) -> str:
    torch.manual_seed(arguments.seed)
    longest = max([*arguments.prefill, arguments.context])
    rows = max(arguments.decode, default=0)
    num_tokens = max(longest, rows * (arguments.context + BLOCK_SIZE))
    model = Model(arguments.shape, num_tokens, longest, is_fp8=arguments.fp8)
    sections = []
    for count in arguments.prefill:
        run: Callable[[], object] = partial(model.run, model.prefill(count))
        sections.append(section(f"prefill of {count} tokens", run, median_ms(run)))
        print(sections[-1], flush=True)
    for count in arguments.decode:
        run = partial(model.run, model.decode(count, arguments.context))
        name = f"decode of {count}, context {arguments.context}"
        sections.append(section(name, run, median_ms(captured(run))))
        print(sections[-1], flush=True)
    return "\n".join(sections)


def main() -> int:
    parser = parser_of("forward_profile", __doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--prefill", type=int, nargs="*", default=[2048, 8192])
    parser.add_argument("--decode", type=int, nargs="*", default=[1, 32])
    parser.add_argument("--context", type=int, default=1100, help="of decode")
    parser.add_argument("--fp8", action="store_true", help="weights and KV in float8")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA GPU found; these figures need one", file=sys.stderr)
        return 1
    with torch.inference_mode():
        text = measure(arguments)
    if arguments.write:
        publish("forward_profile", "forward-profile", "Kernels of a pass", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
