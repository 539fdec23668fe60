"""The decoder that every supported family is an instance of.

One pass
    1. Token ids become the residual stream `[num_tokens, hidden_size]`.
    2. Each layer writes the KV of these tokens into its part of the pool, attends to all KV
       of their sequences, and transforms. `on_layer(i)` is told when layer i's KV is written:
       from then on it may be sent elsewhere while later layers compute.
    3. In the last layer all KV is written, but only the rows that are sampled attend and go on: for
       a prompt that is one row, before its end none.
    4. `logits` turns them into `[num_samples, vocab_size]`: apart, so that a captured graph
       need hold no logits of padding rows.

A model over several GPUs is one such decoder for each rank (`engine/tensor_parallel`): each has
some heads and columns, and they meet in the embedding, behind the two sums of each layer, and in
the logits.

Families differ only in `ModelConfig`, and in how their weights are kept: `MatrixFactory`. Norm,
rotation, storage and attention are kernels.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import embedding

from engine.models.decoder_layer import NO_PLAN, DecoderLayer, StepPlan
from engine.models.linear import Linear
from engine.models.pair_pass import PairPass
from engine.models.rope import cos_sin_cache
from engine.models.row_pass import RowPass
from engine.offload import tensor_bytes
from engine.tensor_parallel.shard import WHOLE
from engine.tensor_parallel.sharded import sharded_factory
from kernels.attention_backend import GLUON_MIN_QUERIES
from kernels.attention_plan import plan_decode, plan_prefill
from kernels.decode_plan import plan_splits
from kernels.prefill_tiles import plan_tiles
from kernels.rope_store import plan_tokens

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as SequenceOf

    from engine.batch import Batch, Samples
    from engine.models.config import ModelConfig
    from engine.models.linear import MatrixFactory
    from engine.offload import OffloadedLayers
    from engine.tensor_parallel.ranks import Ranks
    from kernels.attention_backend import AttentionBackend
    from kernels.attention_plan import AttentionPlan


class Decoder:
    """A model whose weights are still to be filled in through `checkpoint_views`.

    Life: built empty -> views filled by a loader -> `pack()` -> `forward` for ever after.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        max_model_len: int,
        dtype: torch.dtype,
        device: torch.device,
        make_matrix: MatrixFactory | None = None,
        kv_dtype: torch.dtype | None = None,
        ranks: Ranks | None = None,
        offloaded: OffloadedLayers | None = None,
        attention_backend: AttentionBackend | None = None,
    ) -> None:
        """`make_matrix` builds the matrices of the layers; None keeps them as they are.

        `kv_dtype`: of the KV pool where that is not `dtype`.
        `ranks`: this is one shard of a model, `config` says what this rank has of it, and all
        ranks call `forward` and `logits` with the same batches. `offloaded`: the layers that
        live in main memory. `attention_backend`: the kernel of attention to prompts on a GPU.
        """
        self.config = config
        self._ranks = ranks
        self._attention_backend = attention_backend
        self._windows = frozenset(config.layer_windows)
        self._row_pass: RowPass | None = None
        self._pair_pass: PairPass | None = None
        self._cos_sin = cos_sin_cache(config, max_model_len, device)
        self._embedding, self._lm_head = _empty_ends(config, ranks, dtype, device)
        self._norm = torch.empty(config.hidden_size, dtype=dtype, device=device)
        make_matrix = make_matrix or partial(Linear.empty, dtype=dtype, device=device)
        if ranks is not None:
            make_matrix = sharded_factory(make_matrix, ranks)
        self.offloaded = offloaded
        self._layers: list[DecoderLayer] = []
        for index in range(config.num_layers):
            layer = DecoderLayer(
                config, index, make_matrix, dtype=dtype, kv_dtype=kv_dtype or dtype, device=device
            )
            if offloaded is not None and index in offloaded:
                offloaded.take_out(layer)
            self._layers.append(layer)

    def layer_bytes(self) -> list[int]:
        """Bytes of the weights of each layer; also on the device "meta", before any exist."""
        return [tensor_bytes(layer) for layer in self._layers]

    def checkpoint_views(self) -> dict[str, torch.Tensor]:
        """Where each tensor of a Hugging Face checkpoint belongs: name -> memory to fill.

        Views of the merged matrices: filling them is the merge.
        """
        views = {"model.norm.weight": self._norm}
        if len(self._embedding):
            views["model.embed_tokens.weight"] = self._embedding
        if not self.config.tie_word_embeddings:
            views["lm_head.weight"] = self._lm_head.weight
        for layer in self._layers:
            views |= layer.checkpoint_views()
        return views

    def pack(self) -> None:
        """Give each filled matrix its fastest layout; the views are void from now on."""
        for index, layer in enumerate(self._layers):
            if self.offloaded is not None and index in self.offloaded:
                self.offloaded.adopt(layer)
                continue
            for matrix in layer.matrices():
                matrix.pack()
        if self.offloaded is not None:
            self.offloaded.finish()
        self._lm_head.pack(keep_weight=self.config.tie_word_embeddings)
        if self.offloaded is None:
            self._row_pass = RowPass.of(self._layers, self._ranks)
            self._pair_pass = PairPass.of(self._layers)

    def forward(
        self,
        batch: Batch,
        kv_layers: SequenceOf[torch.Tensor],
        on_layer: Callable[[int], None] | None = None,
    ) -> torch.Tensor | None:
        """Hidden states `[num_samples, hidden_size]` for `logits`; None when no row is sampled.

        `kv_layers[i]`: `[num_blocks, 2, num_kv_heads, block_size, head_size]`, written to.
        """
        residual = self._embed(batch.token_ids)
        plan = self._plan(batch, kv_layers[0])
        one_row = batch.is_decode and len(residual) == batch.num_samples == 1
        if self._row_pass is not None and one_row:
            return self._row_pass.run(residual, batch, kv_layers, self._cos_sin, plan, on_layer)
        if self._pair_pass is not None and self._pair_pass.takes(batch):
            return self._pair_pass.run(residual, batch, kv_layers, self._cos_sin, plan, on_layer)
        last = len(self._layers) - 1
        offloaded = self.offloaded
        if offloaded is not None:
            offloaded.begin()
        for index, layer in enumerate(self._layers):
            if offloaded is not None:
                offloaded.enter(index)
            tell = None if self._ranks is not None else on_layer
            on_stored = None if tell is None else partial(tell, index)
            samples = batch.samples if index == last else None
            attended = self._attend(
                layer, samples, residual, batch, kv_layers[index], plan, on_stored
            )
            if attended is None:
                self._end_without_sample(index, on_layer)
                return None
            if samples is not None:
                residual = residual.index_select(0, samples.indices)
            residual = layer.transform(attended, residual)
            if on_layer is not None and self._ranks is not None:
                on_layer(index)  # behind a sum: the KV of the other ranks is written, too
            if offloaded is not None:
                offloaded.leave(index)
        return residual

    def _attend(
        self,
        layer: DecoderLayer,
        samples: Samples | None,
        residual: torch.Tensor,
        batch: Batch,
        kv_layer: torch.Tensor,
        plan: StepPlan,
        on_stored: Callable[[], None] | None,
    ) -> torch.Tensor | None:
        """What the sampled tokens see (None: all tokens); None when there are none of them. Queries
        of others are gone with it: their memory is the rest of the layer's."""
        query = layer.query(residual, batch, kv_layer, self._cos_sin, plan, on_stored)
        if samples is None:
            return layer.attention(query, batch, kv_layer, plan)
        if batch.num_samples == 0:
            return None
        return layer.attention_of(samples, query, batch, kv_layer)

    def _end_without_sample(self, layer: int, on_layer: Callable[[int], None] | None) -> None:
        """No sum follows that would show that the other ranks have written their KV."""
        if self._ranks is None:
            return
        self._ranks.settle()
        if on_layer is not None:
            on_layer(layer)

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        if self._ranks is None:
            return embedding(token_ids, self._embedding)
        if self._ranks.shard.holds_embedding:
            return self._ranks.from_first(embedding(token_ids, self._embedding))
        return self._ranks.from_first(self._norm.new_empty(len(token_ids), self.config.hidden_size))

    def _plan(self, batch: Batch, kv_layer: torch.Tensor) -> StepPlan:
        if batch.seq_lens.is_cuda:
            return self._device_plan(batch, kv_layer)
        return StepPlan(
            {window: self._attention_plan(batch, kv_layer, window) for window in self._windows},
            plan_tokens(batch.positions, self._cos_sin, batch.slot_mapping, kv_layer.shape[3]),
            {},
        )

    def _device_plan(self, batch: Batch, kv_layer: torch.Tensor) -> StepPlan:
        """Kernels, a decode step's in its graph: nothing of it is known on the host."""
        seq_lens = batch.seq_lens
        if not batch.is_decode:
            if self._attention_backend != "gluon" or batch.max_seqlen_q < GLUON_MIN_QUERIES:
                return NO_PLAN
            tiles = plan_tiles(batch.cu_seqlens_q, seq_lens, len(batch.token_ids))
            return StepPlan({}, None, {}, tiles)
        splits = {
            window: plan_splits(seq_lens, kv_layer, sliding_window=window)
            for window in self._windows
        }
        return StepPlan({}, None, splits)

    def _attention_plan(
        self, batch: Batch, kv_layer: torch.Tensor, window: int | None
    ) -> AttentionPlan:
        num_heads = self.config.num_heads
        if batch.is_decode:
            return plan_decode(
                batch.block_tables,
                batch.seq_lens,
                kv_layer,
                num_heads=num_heads,
                sliding_window=window,
            )
        return plan_prefill(
            batch.block_tables,
            batch.cu_seqlens_q,
            batch.seq_lens,
            kv_layer,
            num_heads=num_heads,
            sliding_window=window,
        )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[num_rows, hidden_size]` -> `[num_rows, vocab_size]`, in the model's type.

        The final norm is part of it.
        """
        logits = self._lm_head.normed(hidden, self._norm, self.config.rms_norm_eps)
        if self._ranks is None:
            return logits
        return self._ranks.gather_logits(logits, self.config.vocab_size)


def _empty_ends(
    config: ModelConfig, ranks: Ranks | None, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, Linear]:
    """The embedding, on the ranks that need one, and the output matrix, maybe tied to it."""
    shard = WHOLE if ranks is None else ranks.shard
    _, num_columns = shard.range_of(config.vocab_size)
    tied = config.tie_word_embeddings
    num_embedded = config.vocab_size if shard.holds_embedding else num_columns if tied else 0
    embedding = torch.empty(num_embedded, config.hidden_size, dtype=dtype, device=device)
    if tied:
        return embedding, Linear(embedding[:num_columns], None)
    return embedding, Linear(embedding.new_empty(num_columns, config.hidden_size), None)
