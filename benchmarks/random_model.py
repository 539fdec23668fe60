"""A model of a known shape with random weights, pass by pass: no scheduler, sampling or engine."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.model_shapes import write_config
from engine.batch import Batch, Samples, table_width
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.quantization import ON_LOAD
from engine.models.quantized_linear import matrix_factory
from kernels.attention_backend import Facts, fastest

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.tensor_parallel.ranks import Ranks

BLOCK_SIZE = 16
DEVICE, DTYPE, FLOAT8 = torch.device("cuda"), torch.bfloat16, torch.float8_e4m3fn
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
