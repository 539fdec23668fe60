"""The decoder that every supported family is an instance of.

One pass
    1. Token ids become hidden states `[num_tokens, hidden_size]`.
    2. Each layer writes the KV of these tokens into its part of the pool, attends to all KV
       of their sequences, and transforms. `on_layer(i)` is told when layer i's KV is written:
       from then on it may be sent elsewhere while later layers compute.
    3. In the last layer only the rows that are sampled go on: for a prompt that is one row.
    4. `logits` turns them into `[num_samples, vocab_size]`: apart, so that a captured graph
       holds no logits of padding rows.

Families differ only in `ModelConfig`. Norm, rotation, storage and attention are kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import embedding

from engine.models.linear import Linear
from engine.models.rope import cos_sin_cache
from kernels.attention_plan import plan_decode, plan_prefill
from kernels.paged_attention import paged_attention
from kernels.prefill_attention import prefill_attention
from kernels.rms_norm import rms_norm
from kernels.rotary import RotaryRows, apply_rotary, gather_rotary
from kernels.silu_mul import silu_mul
from kernels.store_kv import StorePlan, plan_store, store_kv

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as SequenceOf

    from engine.batch import Batch
    from engine.models.config import ModelConfig
    from kernels.attention_plan import AttentionPlan


class StepPlan(NamedTuple):
    """What all layers of a pass would work out alike. On a GPU there is none: kernels do it."""

    attention: dict[int | None, AttentionPlan]  # by sliding window
    slots: StorePlan | None
    rotary: RotaryRows | None


_NO_PLAN = StepPlan({}, None, None)


class DecoderLayer:
    """Weights of one layer and the two halves of its computation."""

    __slots__ = (
        "_eps",
        "_heads",
        "_scale",
        "_window",
        "down",
        "gate_up",
        "input_norm",
        "k_norm",
        "output",
        "post_norm",
        "q_norm",
        "qkv",
    )

    def __init__(
        self, config: ModelConfig, layer: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        def matrix(out_size: int, in_size: int, bias: bool) -> Linear:
            return Linear.empty(out_size, in_size, bias=bias, dtype=dtype, device=device)

        def vector(size: int) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        hidden, head_size = config.hidden_size, config.head_size
        self._heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self._eps = config.rms_norm_eps
        self._scale = head_size**-0.5
        self._window = config.layer_windows[layer]
        self.input_norm = vector(hidden)
        self.post_norm = vector(hidden)
        self.qkv = matrix(sum(self._heads) * head_size, hidden, config.attention_bias)
        self.q_norm = vector(head_size) if config.qk_norm else None
        self.k_norm = vector(head_size) if config.qk_norm else None
        self.output = matrix(hidden, config.num_heads * head_size, config.output_bias)
        self.gate_up = matrix(2 * config.intermediate_size, hidden, config.mlp_bias)
        self.down = matrix(hidden, config.intermediate_size, config.mlp_bias)

    def attend(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        batch: Batch,
        kv_layer: torch.Tensor,
        cos_sin: torch.Tensor,
        plan: StepPlan,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store these tokens' KV and attend: `[num_tokens, num_heads * head_size]`, residual."""
        if residual is None:
            residual = hidden
            normed = rms_norm(hidden, self.input_norm, self._eps)
        else:
            normed, residual = rms_norm(hidden, self.input_norm, self._eps, residual=residual)
        num_tokens = hidden.shape[0]
        heads = self.qkv(normed).view(num_tokens, sum(self._heads), -1)
        query, key, value = torch.split_with_sizes(heads, self._heads, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            query = rms_norm(query, self.q_norm, self._eps)
            key = rms_norm(key, self.k_norm, self._eps)
        apply_rotary(query, key, batch.positions, cos_sin, rows=plan.rotary)
        store_kv(key, value, kv_layer, batch.slot_mapping, plan=plan.slots)
        attended = self._attention(query, kv_layer, batch, plan.attention.get(self._window))
        return attended.view(num_tokens, -1), residual

    def transform(
        self, attended: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The rest of the layer, row by row: hidden states `[num_rows, hidden_size]`, residual."""
        normed, residual = rms_norm(
            self.output(attended), self.post_norm, self._eps, residual=residual
        )
        return self.down(silu_mul(self.gate_up(normed))), residual

    def _attention(
        self,
        query: torch.Tensor,
        kv_layer: torch.Tensor,
        batch: Batch,
        plan: AttentionPlan | None,
    ) -> torch.Tensor:
        if batch.is_decode:
            return paged_attention(
                query,
                kv_layer,
                batch.block_tables,
                batch.seq_lens,
                scale=self._scale,
                sliding_window=self._window,
                plan=plan,
            )
        return prefill_attention(
            query,
            kv_layer,
            batch.block_tables,
            batch.cu_seqlens_q,
            batch.seq_lens,
            max_seqlen_q=batch.max_seqlen_q,
            scale=self._scale,
            sliding_window=self._window,
            plan=plan,
        )

    def matrices(self) -> tuple[Linear, ...]:
        return (self.qkv, self.output, self.gate_up, self.down)


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
    ) -> None:
        self.config = config
        self._windows = frozenset(config.layer_windows)
        self._cos_sin = cos_sin_cache(config, max_model_len, device)
        self._embedding = torch.empty(
            config.vocab_size, config.hidden_size, dtype=dtype, device=device
        )
        self._norm = torch.empty(config.hidden_size, dtype=dtype, device=device)
        self._lm_head = Linear(
            self._embedding if config.tie_word_embeddings else torch.empty_like(self._embedding),
            None,
        )
        self._layers = [
            DecoderLayer(config, layer, dtype=dtype, device=device)
            for layer in range(config.num_layers)
        ]

    def checkpoint_views(self) -> dict[str, torch.Tensor]:
        """Where each tensor of a Hugging Face checkpoint belongs: name -> memory to fill.

        Views of the merged matrices: filling them is the merge.
        """
        config = self.config
        views = {"model.embed_tokens.weight": self._embedding, "model.norm.weight": self._norm}
        if not config.tie_word_embeddings:
            views["lm_head.weight"] = self._lm_head.weight
        query_size = config.num_heads * config.head_size
        kv_size = config.num_kv_heads * config.head_size
        for index, layer in enumerate(self._layers):
            prefix = f"model.layers.{index}"
            attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
            views[f"{prefix}.input_layernorm.weight"] = layer.input_norm
            views[f"{prefix}.post_attention_layernorm.weight"] = layer.post_norm
            if layer.q_norm is not None and layer.k_norm is not None:
                views[f"{attention}.q_norm.weight"] = layer.q_norm
                views[f"{attention}.k_norm.weight"] = layer.k_norm
            qkv = {"q_proj": query_size, "k_proj": kv_size, "v_proj": kv_size}
            gate_up = dict.fromkeys(("gate_proj", "up_proj"), config.intermediate_size)
            views |= _row_views(layer.qkv, attention, qkv)
            views |= _row_views(layer.output, attention, {"o_proj": config.hidden_size})
            views |= _row_views(layer.gate_up, mlp, gate_up)
            views |= _row_views(layer.down, mlp, {"down_proj": config.hidden_size})
        return views

    def pack(self) -> None:
        """Give each filled matrix its fastest layout; the views are void from now on."""
        for layer in self._layers:
            for matrix in layer.matrices():
                matrix.pack()
        self._lm_head.pack(keep_weight=self.config.tie_word_embeddings)

    def forward(
        self,
        batch: Batch,
        kv_layers: SequenceOf[torch.Tensor],
        on_layer: Callable[[int], None] | None = None,
    ) -> torch.Tensor | None:
        """Normed hidden states `[num_samples, hidden_size]`; None when no row is sampled.

        `kv_layers[i]`: `[num_blocks, 2, num_kv_heads, block_size, head_size]`, written to.
        """
        hidden = embedding(batch.token_ids, self._embedding)
        residual: torch.Tensor | None = None
        plan = self._plan(batch, kv_layers[0])
        last = len(self._layers) - 1
        for index, layer in enumerate(self._layers):
            attended, residual = layer.attend(
                hidden, residual, batch, kv_layers[index], self._cos_sin, plan
            )
            if on_layer is not None:
                on_layer(index)
            if index == last:
                if batch.num_samples == 0:
                    return None
                if batch.sample_indices is not None:
                    attended = attended.index_select(0, batch.sample_indices)
                    residual = residual.index_select(0, batch.sample_indices)
            hidden, residual = layer.transform(attended, residual)
        normed, _ = rms_norm(hidden, self._norm, self.config.rms_norm_eps, residual=residual)
        return normed

    def _plan(self, batch: Batch, kv_layer: torch.Tensor) -> StepPlan:
        if batch.seq_lens.is_cuda:
            return _NO_PLAN
        return StepPlan(
            {window: self._attention_plan(batch, kv_layer, window) for window in self._windows},
            plan_store(batch.slot_mapping, kv_layer.shape[3]),
            gather_rotary(batch.positions, self._cos_sin),
        )

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

    def logits(self, normed: torch.Tensor) -> torch.Tensor:
        """`[num_rows, hidden_size]` -> `[num_rows, vocab_size]`, in the model's type."""
        return self._lm_head(normed)


def _row_views(matrix: Linear, prefix: str, sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    """The rows of a merged matrix by the names they have in a checkpoint."""
    views: dict[str, torch.Tensor] = {}
    begin = 0
    for name, size in sizes.items():
        views[f"{prefix}.{name}.weight"] = matrix.weight[begin : begin + size]
        if matrix.bias is not None:
            views[f"{prefix}.{name}.bias"] = matrix.bias[begin : begin + size]
        begin += size
    return views
