"""A quantised checkpoint answers like the plain one that holds its dequantised weights."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.errors import ConfigError
from tests.quantized_checkpoints import (
    awq,
    float8_by_block,
    float8_by_channel,
    float8_by_tensor,
    gptq,
    with_input_scale,
    write_pair,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from engine.engine import Engine
    from tests.engine.conftest import OpenEngine, RunGreedy
    from tests.quantized_checkpoints import Tensors

COMPRESSED: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8,
                "type": "float",
                "strategy": "channel",
                "symmetric": True,
                "dynamic": False,
            },
            "input_activations": {
                "num_bits": 8,
                "type": "float",
                "strategy": "token",
                "symmetric": True,
                "dynamic": True,
            },
        }
    },
    "kv_cache_scheme": None,
}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "desc_act": False}


def static_by_tensor(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    stored, meant = float8_by_tensor(weight)
    return with_input_scale(stored, 0.25), meant


def whole_columns(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    return gptq(weight, weight.shape[1])


LAYOUTS: dict[str, tuple[Callable[..., tuple[Tensors, torch.Tensor]], dict[str, Any]]] = {
    "compressed-tensors by channel": (float8_by_channel, COMPRESSED),
    "compressed-tensors by tensor": (float8_by_tensor, COMPRESSED),
    "fp8 dynamic": (float8_by_tensor, FP8),
    "fp8 static": (static_by_tensor, FP8 | {"activation_scheme": "static"}),
    "fp8 by block": (partial(float8_by_block, size=24), FP8 | {"weight_block_size": [24, 24]}),
    "awq": (partial(awq, group_size=16), AWQ),
    "gptq": (partial(gptq, group_size=16), GPTQ),
    "gptq symmetric": (partial(gptq, group_size=16, symmetric=True), GPTQ | {"sym": True}),
    "gptq without groups": (partial(gptq, group_size=16, has_groups=False), GPTQ),
    "gptq of whole columns": (whole_columns, GPTQ | {"group_size": -1}),
    "gptq v2": (
        partial(gptq, group_size=16, zero_offset=0),
        GPTQ | {"checkpoint_format": "gptq_v2"},
    ),
    "gptq in order of activation": (
        partial(gptq, group_size=16, activation_order=True),
        GPTQ | {"desc_act": True},
    ),
}
PROMPTS = [list(range(3, 3 + length)) for length in (1, 7, 16, 33)]


def tokens_of(engine: Engine, run_greedy: RunGreedy) -> list[list[int]]:
    sequences = run_greedy(engine, PROMPTS, chunk=512, num_tokens=16)
    return [sequence.output_token_ids for sequence in sequences]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama3", "qwen2"])
def test_tokens_are_those_of_the_dequantised_checkpoint(
    layout: str,
    family: str,
    checkpoints: Path,
    tmp_path: Path,
    open_engine: OpenEngine,
    run_greedy: RunGreedy,
) -> None:
    quantize, config = LAYOUTS[layout]
    pair = write_pair(checkpoints / family, tmp_path, quantize, config)
    quantized, plain = open_engine(str(pair.quantized)), open_engine(str(pair.plain))
    assert tokens_of(quantized, run_greedy) == tokens_of(plain, run_greedy)
    assert quantized.weights_fingerprint != plain.weights_fingerprint


def test_matrices_that_are_left_plain_are_taken_as_they_are(
    checkpoints: Path, tmp_path: Path, open_engine: OpenEngine, run_greedy: RunGreedy
) -> None:
    ignored = ("layers.0.mlp.down_proj", "layers.1.self_attn.q_proj")
    pair = write_pair(
        checkpoints / "qwen2", tmp_path, float8_by_channel, COMPRESSED, ignored=ignored
    )
    quantized, plain = open_engine(str(pair.quantized)), open_engine(str(pair.plain))
    assert tokens_of(quantized, run_greedy) == tokens_of(plain, run_greedy)


def test_quantising_while_loading_gives_rows_their_own_scales(
    checkpoints: Path, tmp_path: Path, open_engine: OpenEngine, run_greedy: RunGreedy
) -> None:
    source = checkpoints / "qwen3"
    pair = write_pair(source, tmp_path, float8_by_channel, COMPRESSED)
    on_load, plain = open_engine("qwen3", quantization="fp8"), open_engine(str(pair.plain))
    assert tokens_of(on_load, run_greedy) == tokens_of(plain, run_greedy)
    assert on_load.weights_fingerprint != open_engine("qwen3").weights_fingerprint


def test_biases_of_zeros_that_gptq_adds_are_no_error(
    checkpoints: Path, tmp_path: Path, open_engine: OpenEngine, run_greedy: RunGreedy
) -> None:
    name = "model.layers.0.mlp.down_proj.bias"
    quantize, config = LAYOUTS["gptq"]
    zeros, ones = {name: torch.zeros(64)}, {name: torch.ones(64)}
    pair = write_pair(checkpoints / "qwen2", tmp_path / "0", quantize, config, more=zeros)
    quantized, plain = open_engine(str(pair.quantized)), open_engine(str(pair.plain))
    assert tokens_of(quantized, run_greedy) == tokens_of(plain, run_greedy)
    pair = write_pair(checkpoints / "qwen2", tmp_path / "1", quantize, config, more=ones)
    with pytest.raises(ConfigError, match=r"does not use: .*down_proj\.bias"):
        open_engine(str(pair.quantized))


@pytest.mark.parametrize(
    ("asked", "layout", "found"),
    [
        ("awq", None, "not quantized"),
        ("gptq", None, "not quantized"),
        ("compressed-tensors", None, "not quantized"),
        ("awq", "gptq", "in gptq layout"),
        ("gptq", "awq", "in awq layout"),
        ("fp8", "awq", "in awq layout"),
        ("fp8", "gptq", "in gptq layout"),
        ("awq", "fp8 dynamic", "in fp8 layout"),
        ("compressed-tensors", "fp8 dynamic", "in fp8 layout"),
        ("gptq", "compressed-tensors by channel", "in compressed-tensors layout"),
    ],
)
def test_a_method_that_the_checkpoint_does_not_have_is_refused_in_one_line(
    asked: str,
    layout: str | None,
    found: str,
    checkpoints: Path,
    tmp_path: Path,
    open_engine: OpenEngine,
) -> None:
    folder = checkpoints / "qwen2"
    if layout is not None:
        folder = write_pair(folder, tmp_path, *LAYOUTS[layout]).quantized
    with pytest.raises(ConfigError) as refused:
        open_engine(str(folder), quantization=asked)
    assert str(refused.value) == f"--quantization {asked}: the checkpoint is {found}."
    assert refused.value.param == "quantization"


@pytest.mark.parametrize(
    ("asked", "layout"),
    [
        ("fp8", "fp8 dynamic"),
        ("fp8", "compressed-tensors by channel"),
        ("compressed-tensors", "compressed-tensors by channel"),
        ("awq", "awq"),
        ("gptq", "gptq"),
    ],
)
def test_the_method_of_the_checkpoint_may_be_named(
    asked: str, layout: str, checkpoints: Path, tmp_path: Path, open_engine: OpenEngine
) -> None:
    pair = write_pair(checkpoints / "qwen2", tmp_path, *LAYOUTS[layout])
    named, unnamed = (open_engine(str(pair.quantized), quantization=q) for q in (asked, None))
    assert named.weights_fingerprint == unnamed.weights_fingerprint


FIRST = "model.layers.0.mlp.down_proj"


def _drop(kind: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(f"{FIRST}.{kind}")


def _put(kind: str, tensor: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({f"{FIRST}.{kind}": tensor})


@pytest.mark.parametrize(
    ("layout", "damage", "message"),
    [
        ("fp8 dynamic", _drop("weight_scale"), r"lacks .*down_proj\.weight_scale"),
        ("fp8 static", _drop("input_scale"), r"lacks .*down_proj\.input_scale"),
        ("fp8 dynamic", _put("weight_scale", torch.ones(3)), r"weight_scale has shape \[3\]"),
        ("fp8 by block", _put("weight_scale_inv", torch.ones(1, 1)), r"shape \[1, 1\], not"),
        ("fp8 dynamic", _put("weight_scale", torch.ones(1).int()), "is stored as I32"),
        ("awq", _drop("qzeros"), r"lacks .*down_proj\.qzeros"),
        ("awq", _drop("qweight"), r"lacks .*down_proj\.weight"),
        ("awq", _put("scales", torch.ones(2, 2)), r"scales has shape \[2, 2\]"),
        ("gptq", _put("g_idx", torch.full((96,), 99).int()), "not all of one size"),
        ("awq", _put("qweight", torch.ones(7, 8).int()), "no multiple of groups"),
        ("awq", _put("lora_a", torch.ones(7)), "does not use: .*lora_a"),
    ],
)
def test_damage_is_named(
    layout: str,
    damage: Callable[[Tensors], object],
    message: str,
    checkpoints: Path,
    tmp_path: Path,
    open_engine: OpenEngine,
) -> None:
    pair = write_pair(checkpoints / "qwen2", tmp_path, *LAYOUTS[layout])
    path = pair.quantized / "model.safetensors"
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path)
    with pytest.raises(ConfigError, match=message):
        open_engine(str(pair.quantized))


def test_quantised_tensors_that_the_config_does_not_tell_are_refused(
    checkpoints: Path, tmp_path: Path, open_engine: OpenEngine
) -> None:
    for layout, message in (("fp8 dynamic", "is stored as F8_E4M3"), ("awq", "does not tell")):
        pair = write_pair(checkpoints / "qwen2", tmp_path / layout, *LAYOUTS[layout])
        facts = json.loads((pair.quantized / "config.json").read_text())
        del facts["quantization_config"]
        (pair.quantized / "config.json").write_text(json.dumps(facts))
        with pytest.raises(ConfigError, match=message):
            open_engine(str(pair.quantized))
