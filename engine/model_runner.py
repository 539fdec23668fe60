"""Runs a decision through the model: inputs, forward pass, logits of the sampled rows.

A decode decision replays a captured graph on a GPU; everything else runs kernel by kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.batch import BatchBuilder, table_width
from engine.cuda_graphs import DecodeGraphs

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as SequenceOf

    import torch

    from cluster.startup import StartupReport
    from engine.kv_cache import KVCache
    from engine.limits import EngineLimits
    from engine.models.decoder import Decoder
    from engine.schedule import ScheduledChunk
    from engine.tensor_parallel.wire import Announce, StepHeader


class ModelRunner:
    """One model over one KV pool. Not thread-safe; calls run under `torch.inference_mode`."""

    def __init__(
        self,
        decoder: Decoder,
        kv_cache: KVCache,
        limits: EngineLimits,
        announce: Announce | None = None,
    ) -> None:
        """`announce`: tells the other ranks of the same model what to run."""
        self._decoder = decoder
        self._kv_layers = kv_cache.layers
        self._limits = limits
        self._block_size = kv_cache.layout.block_size
        self._batches = BatchBuilder(
            block_size=self._block_size,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_model_len=limits.max_model_len,
            device=limits.device,
            announce=announce,
        )
        self._graphs: DecodeGraphs | None = None

    def capture_graphs(self, progress: StartupReport) -> None:
        """From now on decode steps replay graphs. GPU only."""
        self._graphs = DecodeGraphs(
            self._decoder,
            self._kv_layers,
            self._batches.buffer,
            max_num_seqs=self._limits.max_graph_rows,
            table_width=table_width(-(-self._limits.max_model_len // self._block_size)),
            device=self._limits.device,
        )
        self._graphs.capture(progress)

    def run(
        self,
        chunks: SequenceOf[ScheduledChunk],
        *,
        is_decode: bool,
        on_layer: Callable[[int], None] | None = None,
    ) -> torch.Tensor | None:
        """Logits `[num_samples, vocab_size]` of the chunks that sample, in order; None if none.

        `is_decode`: each chunk is the last token of its sequence. `on_layer(i)` is called when
        the KV of layer i is written (on a GPU: when the kernels that write it are queued on the
        current stream).
        """
        if is_decode:
            hidden = self._decode(chunks, on_layer)
        else:
            batch = self._batches.build_prefill(chunks)
            hidden = self._decoder.forward(batch, self._kv_layers, on_layer)
        return None if hidden is None else self._decoder.logits(hidden)

    def follow(self, header: StepHeader, fill: Callable[[memoryview], None]) -> None:
        """Run what rank 0 announced, as it does; `fill` writes the packed inputs."""
        batch = self._batches.receive(header, fill)
        if header.is_decode and self._graphs is not None:
            hidden: torch.Tensor | None = self._graphs.replay(batch, header.num_samples)
        else:
            hidden = self._decoder.forward(batch, self._kv_layers)
            if hidden is not None:
                hidden = hidden[: header.num_samples]
        if hidden is not None:
            self._decoder.logits(hidden)

    def _decode(
        self, chunks: SequenceOf[ScheduledChunk], on_layer: Callable[[int], None] | None
    ) -> torch.Tensor | None:
        num_seqs = len(chunks)
        if self._graphs is None or on_layer is not None or num_seqs > self._graphs.max_rows:
            batch = self._batches.build_decode(chunks)
            return self._decoder.forward(batch, self._kv_layers, on_layer)
        batch = self._batches.build_decode(chunks, self._graphs.padded(num_seqs))
        return self._graphs.replay(batch, num_seqs)
