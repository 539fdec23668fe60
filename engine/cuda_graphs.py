"""Decode steps as CUDA graphs.

Life of the graphs
    1. One graph for each padded number of rows, captured at start, the largest first so that
       the smaller ones reuse its memory.
    2. A step of n sequences takes the smallest graph with at least n rows. Its inputs were
       uploaded to where the graph reads them; the block tables, whose width varies, are
       copied into rows of fixed width. Then one launch runs all layers.
    3. Rows beyond n are padding: seq_len 0 and slot -1, so they read and write no KV.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from engine.batch import Batch, BatchShape, decode_batch

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from torch.cuda import _POOL_HANDLE

    from cluster.startup import StartupReport
    from engine.batch import InputBuffer
    from engine.models.decoder import Decoder

_WARM_UP_RUNS = 2


def capture_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, every eighth to 256, then every 32nd, up to and including `max_num_seqs`."""
    steps = (1, 2, 4, *range(8, 257, 8), *range(288, max_num_seqs + 1, 32))
    sizes = [size for size in steps if size <= max_num_seqs]
    return sizes if sizes[-1] == max_num_seqs else [*sizes, max_num_seqs]


class DecodeGraphs:
    """The captured decode steps of one model over one KV pool."""

    def __init__(
        self,
        decoder: Decoder,
        kv_layers: SequenceOf[torch.Tensor],
        buffer: InputBuffer,
        *,
        max_num_seqs: int,
        table_width: int,
        device: torch.device,
    ) -> None:
        self._decoder = decoder
        self._kv_layers = kv_layers
        self._buffer = buffer
        self._tables = torch.zeros(max_num_seqs, table_width, dtype=torch.int32, device=device)
        self._sizes = capture_sizes(max_num_seqs)
        self._size_of = [0] * (max_num_seqs + 1)
        for size in reversed(self._sizes):
            self._size_of[: size + 1] = [size] * (size + 1)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._outputs: dict[int, torch.Tensor] = {}

    @property
    def max_rows(self) -> int:
        """Longer batches have no graph."""
        return self._sizes[-1]

    def padded(self, num_seqs: int) -> int:
        """Rows of the graph that runs `num_seqs` sequences."""
        return self._size_of[num_seqs]

    def capture(self, progress: StartupReport) -> None:
        with progress.phase("capture graphs", total=len(self._sizes)) as phase:
            pool = torch.cuda.graph_pool_handle()
            stream = torch.cuda.Stream(self._tables.device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            for size in reversed(self._sizes):
                self._warm_up_and_capture(size, pool, stream)
                phase.advance(1)
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()

    def replay(self, batch: Batch, num_seqs: int) -> torch.Tensor:
        """Hidden states `[num_seqs, hidden_size]`, valid until the next replay."""
        num_rows, width = batch.block_tables.shape
        self._tables[:num_rows, :width].copy_(batch.block_tables)
        self._graphs[num_rows].replay()
        return self._outputs[num_rows][:num_seqs]

    def _warm_up_and_capture(
        self, num_rows: int, pool: _POOL_HANDLE, stream: torch.cuda.Stream
    ) -> None:
        with torch.cuda.stream(stream):
            batch = self._padding_batch(num_rows)
            for _ in range(_WARM_UP_RUNS):  # compiles kernels and makes cuBLAS allocate
                self._forward(batch)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            self._outputs[num_rows] = self._forward(batch)
        self._graphs[num_rows] = graph

    def _padding_batch(self, num_rows: int) -> Batch:
        """Rows that compute nothing, in the memory where real ones will be."""
        views = self._buffer.device_views(BatchShape(num_rows, num_rows, 0, 0))
        batch = decode_batch(views, self._tables[:num_rows])
        for tensor in (batch.token_ids, batch.positions, batch.seq_lens):
            tensor.zero_()
        batch.slot_mapping.fill_(-1)
        return batch

    def _forward(self, batch: Batch) -> torch.Tensor:
        hidden = self._decoder.forward(batch, self._kv_layers)
        if hidden is None:
            raise RuntimeError("A decode batch samples all its rows.")
        return hidden
