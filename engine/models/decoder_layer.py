"""One layer of a decoder: its weights and the two halves of its computation.

Both halves take the residual stream and give it back with their sum in it; what they compute
in between never meets the stream but through `Matrix`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from engine.models.linear import MatrixSpec
from kernels.decode_plan import plan_splits
from kernels.paged_attention import paged_attention
from kernels.prefill_attention import prefill_attention
from kernels.rope_store import TokenPlan, rope_store

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.batch import Batch, Samples
    from engine.models.config import ModelConfig
    from engine.models.linear import Matrix, MatrixFactory
    from kernels.attention_plan import AttentionPlan
    from kernels.decode_plan import SplitPlan
    from kernels.prefill_tiles import PrefillTiles


class StepPlan(NamedTuple):
    """What all layers of a pass would work out alike; dictionaries are by sliding window.

    On a GPU that is the `splits` of a decode step and, where Gluon attends to prompts, the `tiles`
    of any other; for the rest kernels do it.
    """

    attention: dict[int | None, AttentionPlan]
    tokens: TokenPlan | None
    splits: dict[int | None, SplitPlan]
    tiles: PrefillTiles | None = None


NO_PLAN = StepPlan({}, None, {})


class DecoderLayer:
    """`make_matrix` decides how weights are kept; everything else is in `config`.

    `kv_scales`: float32 `[2, num_kv_heads]`, what keys and values are divided by in a float8 pool;
    None as long as the pool has the type of the model.
    """

    __slots__ = (
        "_scale",
        "_window",
        "down",
        "eps",
        "gate_up",
        "input_norm",
        "k_norm",
        "kv_scales",
        "output",
        "post_norm",
        "prefix",
        "q_norm",
        "qkv",
    )

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        make_matrix: MatrixFactory,
        *,
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        def vector(size: int) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        self.prefix = f"model.layers.{layer}"
        self.eps = config.rms_norm_eps
        self._scale = config.head_size**-0.5
        self._window = config.layer_windows[layer]
        self.input_norm = vector(config.hidden_size)
        self.post_norm = vector(config.hidden_size)
        self.q_norm = vector(config.head_size) if config.qk_norm else None
        self.k_norm = vector(config.head_size) if config.qk_norm else None
        # What stored keys and values are multiplied by, where their type needs it.
        self.kv_scales: torch.Tensor | None = None
        if kv_dtype != dtype:
            self.kv_scales = torch.ones(2, config.num_kv_heads, device=device)
        qkv, output, gate_up, down = _specs(config, self.prefix)
        self.qkv: Matrix = make_matrix(qkv)
        self.output: Matrix = make_matrix(output)
        self.gate_up: Matrix = make_matrix(gate_up)
        self.down: Matrix = make_matrix(down)

    def matrices(self) -> tuple[Matrix, ...]:
        return (self.qkv, self.output, self.gate_up, self.down)

    def checkpoint_views(self) -> dict[str, torch.Tensor]:
        """Name in the checkpoint -> memory to fill."""
        views = {
            f"{self.prefix}.input_layernorm.weight": self.input_norm,
            f"{self.prefix}.post_attention_layernorm.weight": self.post_norm,
        }
        if self.q_norm is not None and self.k_norm is not None:
            views[f"{self.prefix}.self_attn.q_norm.weight"] = self.q_norm
            views[f"{self.prefix}.self_attn.k_norm.weight"] = self.k_norm
        if self.kv_scales is not None:
            views[f"{self.prefix}.self_attn.k_scale"] = self.kv_scales[0]
            views[f"{self.prefix}.self_attn.v_scale"] = self.kv_scales[1]
        for matrix in self.matrices():
            views |= matrix.checkpoint_views()
        return views

    def query(
        self,
        residual: torch.Tensor,
        batch: Batch,
        kv_layer: torch.Tensor,
        cos_sin: torch.Tensor,
        plan: StepPlan,
        on_stored: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        """Store these tokens' KV and say so; their queries, for `attention`.

        Leaves the stream as it is: only the rows that go on need the sum (`transform`).
        """
        qkv = self.qkv.normed(residual, self.input_norm, self.eps)
        query = self.store(qkv, batch, kv_layer, cos_sin, plan)
        if on_stored is not None:
            on_stored()
        return query

    def store(
        self,
        qkv: torch.Tensor,
        batch: Batch,
        kv_layer: torch.Tensor,
        cos_sin: torch.Tensor,
        plan: StepPlan,
    ) -> torch.Tensor:
        """Store the KV of `[num_tokens, qkv size]`; queries `[num_tokens, num_heads, head_size]`
        as attention wants them."""
        return rope_store(
            qkv,
            kv_layer,
            batch.slot_mapping,
            batch.positions,
            cos_sin,
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            eps=self.eps,
            kv_scales=self.kv_scales,
            plan=plan.tokens,
        )

    def attention(
        self,
        query: torch.Tensor,
        batch: Batch,
        kv_layer: torch.Tensor,
        plan: StepPlan,
    ) -> torch.Tensor:
        """What these queries see in the KV of their sequences: `[num_tokens, num_heads *
        head_size]`."""
        attended = self._attention(query, kv_layer, batch, plan)
        return attended.view(len(attended), -1)

    def attention_of(
        self, samples: Samples, query: torch.Tensor, batch: Batch, kv_layer: torch.Tensor
    ) -> torch.Tensor:
        """The same of these alone, each the newest token of its sequence, as in a decode step."""
        tables, seq_lens = batch.block_tables, batch.seq_lens
        if batch.num_samples < len(seq_lens):
            tables = tables.index_select(0, samples.rows)
            seq_lens = seq_lens.index_select(0, samples.rows)
        plan = None
        if query.is_cuda:  # in front of what torch launches: a kernel chained to it may not see it
            plan = plan_splits(seq_lens, kv_layer, sliding_window=self._window)
        attended = paged_attention(
            query.index_select(0, samples.indices),
            kv_layer,
            tables,
            seq_lens,
            scale=self._scale,
            sliding_window=self._window,
            plan=plan,
            kv_scales=self.kv_scales,
        )
        return attended.view(len(attended), -1)

    def transform(self, attended: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The rest of the layer, row by row: the stream `[num_rows, hidden_size]` behind it."""
        residual = _join(self.output, attended, residual)
        activated = self.gate_up.normed_silu_mul(residual, self.post_norm, self.eps)
        return _join(self.down, activated, residual)

    def _attention(
        self,
        query: torch.Tensor,
        kv_layer: torch.Tensor,
        batch: Batch,
        plan: StepPlan,
    ) -> torch.Tensor:
        gathers = plan.attention.get(self._window)
        if batch.is_decode:
            return paged_attention(
                query,
                kv_layer,
                batch.block_tables,
                batch.seq_lens,
                scale=self._scale,
                sliding_window=self._window,
                plan=gathers or plan.splits.get(self._window),
                kv_scales=self.kv_scales,
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
            plan=gathers if plan.tiles is None else plan.tiles,
            kv_scales=self.kv_scales,
            backend="triton" if plan.tiles is None else "gluon",
        )


def _join(matrix: Matrix, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """The stream with a product added: the only place where anything is added to it."""
    return matrix.add_to(x, residual)


def _specs(config: ModelConfig, prefix: str) -> tuple[MatrixSpec, ...]:
    """qkv, output, gate_up and down."""
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    hidden, intermediate = config.hidden_size, config.intermediate_size
    query_size = config.num_heads * config.head_size
    kv_size = config.num_kv_heads * config.head_size
    qkv = {
        f"{attention}.q_proj": query_size,
        f"{attention}.k_proj": kv_size,
        f"{attention}.v_proj": kv_size,
    }
    gate_up = {f"{mlp}.gate_proj": intermediate, f"{mlp}.up_proj": intermediate}
    return (
        MatrixSpec(qkv, hidden, config.attention_bias),
        MatrixSpec({f"{attention}.o_proj": hidden}, query_size, config.output_bias),
        MatrixSpec(gate_up, hidden, config.mlp_bias),
        MatrixSpec({f"{mlp}.down_proj": hidden}, intermediate, config.mlp_bias),
    )
