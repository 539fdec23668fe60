"""Which part of a checkpoint's tensors each rank has."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from cluster.errors import ConfigError
from engine.models.config import ModelConfig
from engine.tensor_parallel.shard import WHOLE, Shard

if TYPE_CHECKING:
    from pathlib import Path

LAYER = "model.layers.3"


@pytest.fixture
def model(checkpoints: Path) -> ModelConfig:
    return ModelConfig.from_folder(checkpoints / "llama3")


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        (f"{LAYER}.self_attn.q_proj.weight", 0),
        (f"{LAYER}.self_attn.v_proj.bias", 0),
        (f"{LAYER}.mlp.up_proj.weight", 0),
        (f"{LAYER}.self_attn.o_proj.weight", 1),
        (f"{LAYER}.self_attn.o_proj.bias", None),
        (f"{LAYER}.mlp.down_proj.weight", 1),
        (f"{LAYER}.input_layernorm.weight", None),
        ("model.norm.weight", None),
        ("lm_head.weight", 0),
    ],
)
def test_matrices_are_cut_so_that_heads_and_columns_stay_together(
    name: str, dim: int | None
) -> None:
    assert [Shard(rank, 2).cut_dim(name) for rank in range(2)] == [dim, dim]
    assert WHOLE.cut_dim(name) is None


def test_only_the_first_rank_has_the_whole_embedding() -> None:
    name = "model.embed_tokens.weight"
    assert [Shard(rank, 3).cut_dim(name) for rank in range(3)] == [None, 0, 0]


def test_a_vocabulary_that_does_not_divide_leaves_less_to_the_last_rank() -> None:
    ranges = [Shard(rank, 4).range_of(10) for rank in range(4)]
    assert ranges == [(0, 3), (3, 3), (6, 3), (9, 1)]


def test_the_parts_of_a_model_make_up_the_model(model: ModelConfig) -> None:
    part = Shard(1, 2).fitted(model).of_model(model)
    assert (2 * part.num_heads, 2 * part.num_kv_heads) == (model.num_heads, model.num_kv_heads)
    assert 2 * part.intermediate_size == model.intermediate_size
    assert part.head_size == model.head_size
    shard = Shard(0, 2).fitted(model)
    assert shard.whole_shape("lm_head.weight", (1, 8)) == (model.vocab_size, 8)
    assert shard.whole_shape(f"{LAYER}.mlp.down_proj.weight", (8, 5)) == (8, 10)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"num_heads": 6, "num_kv_heads": 6}, "6 attention heads"),
        ({"num_heads": 8, "num_kv_heads": 2}, "2 key/value heads"),
        ({"num_heads": 8, "num_kv_heads": 4, "intermediate_size": 130}, "130 columns"),
    ],
)
def test_a_model_that_cannot_be_cut_evenly_is_refused(
    change: dict[str, Any], what: str, model: ModelConfig
) -> None:
    with pytest.raises(ConfigError, match=f"4 does not divide the model's {what}"):
        Shard(0, 4).fitted(replace(model, **change))
