"""The least time of a step, by what this GPU was measured to reach (`kernels/ceilings.py`).

by bytes     a decode step reads all weights and all KV once, at the rate of a copy: as if nothing
             were computed. A prompt computes all its FLOP at the rate of a large product.
by product   of a decode step, each product by the larger of two: its weights at the rate of a copy,
             its FLOP at the rate of a large product; and all KV at the rate of a copy. With few
             rows both floors agree. With more of them than FLOP go into a byte's time, products
             are bound by arithmetic, and this one is higher.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.kernels.ceilings import Ceilings
    from engine.engine import Engine
    from engine.models.config import ModelConfig


class Product(NamedTuple):
    """One for each matrix of the model that a step multiplies by."""

    num_weights: int
    weight_bytes: float

    def seconds(self, num_rows: int, ceilings: Ceilings) -> float:
        num_bytes = self.num_weights * self.weight_bytes
        return ceilings.floor_seconds(num_bytes, 2 * num_rows * self.num_weights)


class Floors:
    """Of a model with weights of `dtype_bytes`, but those that its quantization makes smaller."""

    def __init__(
        self, model: ModelConfig, ceilings: Ceilings, *, dtype_bytes: int, kv_token_bytes: float
    ) -> None:
        self._model = model
        self._ceilings = ceilings
        self._dtype_bytes = dtype_bytes
        self._kv_token_bytes = kv_token_bytes

    @classmethod
    def of(cls, engine: Engine, ceilings: Ceilings) -> Floors:
        layout = engine.kv_layout
        return cls(
            engine.model_config,
            ceilings,
            dtype_bytes=engine.limits.dtype.itemsize,
            kv_token_bytes=layout.block_bytes / layout.block_size,
        )

    def prefill(self, num_tokens: int) -> float:
        """Seconds for the layers' products and causal attention; the output matrix serves one
        token."""
        model = self._model
        embeddings = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
        matrices = 2 * (model.num_parameters - embeddings) * num_tokens
        attention = 2 * num_tokens**2 * model.num_heads * model.head_size * model.num_layers
        return (matrices + attention) / self._ceilings.matmul

    def decode_by_bytes(self, num_seqs: int, context: float) -> float:
        """Seconds. Of the input embedding a step reads one row per sequence, which is nothing."""
        model = self._model
        embeddings = model.vocab_size * model.hidden_size
        unread = 0 if model.tie_word_embeddings else embeddings
        layers = model.num_parameters - unread - embeddings
        weights = layers * self._layer_bytes + embeddings * self._dtype_bytes
        return weights / self._ceilings.copy + self._kv_seconds(num_seqs, context)

    def decode_by_product(self, num_seqs: int, context: float) -> float | None:
        """Seconds. None with weights of float8, whose products have a rate of their own."""
        quantization = self._model.quantization
        if quantization is not None and quantization.is_float8:
            return None
        products = sum(each.seconds(num_seqs, self._ceilings) for each in self._products())
        return products + self._kv_seconds(num_seqs, context)

    def _products(self) -> Iterator[Product]:
        model = self._model
        queries = model.num_heads * model.head_size
        keys_and_values = 2 * model.num_kv_heads * model.head_size
        hidden, intermediate = model.hidden_size, model.intermediate_size
        for _ in range(model.num_layers):
            yield Product(hidden * (queries + keys_and_values), self._layer_bytes)
            yield Product(queries * hidden, self._layer_bytes)
            yield Product(hidden * 2 * intermediate, self._layer_bytes)
            yield Product(intermediate * hidden, self._layer_bytes)
        yield Product(hidden * model.vocab_size, self._dtype_bytes)

    @property
    def _layer_bytes(self) -> float:
        quantization = self._model.quantization
        if quantization is None:
            return self._dtype_bytes
        return 1 if quantization.is_float8 else 0.5

    def _kv_seconds(self, num_seqs: int, context: float) -> float:
        return num_seqs * context * self._kv_token_bytes / self._ceilings.copy
