from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ConfigError
from engine.models.config import ModelConfig, RopeScaling
from engine.models.quantization import Quantization

Read = Callable[..., ModelConfig]

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": [128001, 128008, 128009],
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "rope_scaling": None}


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def read(config: object, generation_config: object = None) -> ModelConfig:
        (tmp_path / "config.json").write_text(json.dumps(config))
        if generation_config is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation_config))
        return ModelConfig.from_folder(tmp_path)

    return read


def test_llama_3_1_is_read_with_its_rope_scaling(read: Read) -> None:
    config = read(LLAMA)
    assert config.head_size == 128
    assert config.num_kv_heads == 8
    assert config.rope_scaling == RopeScaling(
        kind="llama3",
        factor=8.0,
        original_max_position_embeddings=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    assert config.longest_context == 131072
    assert config.eos_token_ids == (128001, 128008, 128009)
    assert config.torch_dtype == "bfloat16"
    assert not config.attention_bias
    assert config.layer_windows == (None,) * 32
    assert config.num_parameters == 8_030_261_248


def test_older_and_newer_spelling_of_the_same_model_are_equal(read: Read) -> None:
    newer = {key: value for key, value in LLAMA.items() if key not in ("rope_theta", "torch_dtype")}
    newer["rope_parameters"] = newer.pop("rope_scaling") | {"rope_theta": 500000.0}
    newer["dtype"] = "bfloat16"
    assert read(newer) == read(LLAMA)


def test_a_base_beside_rope_parameters_counts_where_these_name_none(read: Read) -> None:
    """As in an older checkpoint that was stretched in the newer way."""
    scaling = LLAMA["rope_scaling"]
    newer = LLAMA | {"rope_parameters": scaling, "rope_scaling": None}
    assert read(newer).rope_theta == 500000.0
    assert read(newer).rope_scaling == read(LLAMA).rope_scaling
    nested = newer | {"rope_parameters": scaling | {"rope_theta": 1e6}}
    assert read(nested).rope_theta == 1e6


def test_a_scaling_in_the_older_place_is_not_overlooked_in_a_newer_checkpoint(read: Read) -> None:
    plain = {"rope_type": "default", "rope_theta": 1e6}
    with pytest.raises(ConfigError, match="rope_parameters and rope_scaling differ"):
        read(LLAMA | {"rope_parameters": plain})
    both = read(LLAMA | {"rope_parameters": LLAMA["rope_scaling"]})
    assert both.rope_scaling == read(LLAMA).rope_scaling


def test_qwen2_has_biases_on_q_k_v_only(read: Read) -> None:
    config = read(QWEN2)
    assert config.attention_bias
    assert not config.output_bias


def test_qwen3_has_qk_norm_and_its_own_head_size(read: Read) -> None:
    config = read(QWEN2 | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 64})
    assert config.qk_norm
    assert config.head_size == 64
    assert not config.attention_bias


def test_a_window_holds_for_every_layer_of_mistral(read: Read) -> None:
    mistral = QWEN2 | {"architectures": ["MistralForCausalLM"], "sliding_window": 4096}
    assert read(mistral).layer_windows == (4096,) * 32
    assert read(mistral | {"sliding_window": None}).layer_windows == (None,) * 32


def test_a_window_of_qwen_counts_only_when_switched_on_and_from_its_layer_on(read: Read) -> None:
    windowed = QWEN2 | {"sliding_window": 1024, "max_window_layers": 30}
    assert read(windowed).layer_windows == (None,) * 32
    switched_on = read(windowed | {"use_sliding_window": True})
    assert switched_on.layer_windows == (None,) * 30 + (1024,) * 2


def test_yarn_lengthens_the_context(read: Read) -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = read(QWEN2 | {"max_position_embeddings": 32768, "rope_scaling": yarn})
    assert config.longest_context == 131072


def test_end_tokens_of_generation_config_count_too(read: Read) -> None:
    config = read(QWEN2 | {"eos_token_id": 7}, {"eos_token_id": [9, 7]})
    assert config.eos_token_ids == (9, 7)


def test_end_tokens_beyond_the_vocabulary_are_left_out(read: Read) -> None:
    assert read(QWEN2 | {"eos_token_id": [7, 999_999]}).eos_token_ids == (7,)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no model folder at .*nowhere"):
        ModelConfig.from_folder(tmp_path / "nowhere")


def test_a_folder_that_cannot_be_looked_into_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="cannot be read: File name too long"):
        ModelConfig.from_folder(tmp_path / ("a" * 300))

    def refuse(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(ConfigError, match="cannot be read: Permission denied"):
        ModelConfig.from_folder(tmp_path)


def test_a_name_of_the_hub_is_told_how_to_become_a_folder() -> None:
    with pytest.raises(ConfigError, match=r"hf download some-org/Model-1\.5 --local-dir"):
        ModelConfig.from_folder(Path("some-org/Model-1.5"))


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        ModelConfig.from_folder(tmp_path)


def test_a_config_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        ModelConfig.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "names GPT2LMHeadModel; supported are Llama"),
        ({"architectures": None}, "names no architecture"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": "big"}, "hidden_size must be an integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer"),
        ({"num_key_value_heads": 5}, "do not divide into 5 key/value heads"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"quantization_config": {"bits": 4}}, "quant_method '', which is not supported"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "lacks low_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor must be positive"),
        ({"rope_scaling": 3}, "rope_scaling must be an object"),
        ({"rope_theta": float("nan")}, "rope_theta must be a finite number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is not supported"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be an integer or a list"),
        ({"head_dim": 33}, "odd head size"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(
    read: Read, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read(LLAMA | change)


COMPRESSED: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
            "input_activations": {"num_bits": 8, "type": "float", "dynamic": True},
        }
    },
}


def compressed(side: str, **change: object) -> dict[str, Any]:
    group = COMPRESSED["config_groups"]["group_0"]
    return COMPRESSED | {"config_groups": {"group_0": group | {side: group[side] | change}}}


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ({"quant_method": "fp8"}, Quantization(method="fp8")),
        (
            {"quant_method": "fp8", "activation_scheme": "static"},
            Quantization(method="fp8", static_activations=True),
        ),
        (
            {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
            Quantization(method="fp8", block=(128, 128)),
        ),
        (COMPRESSED, Quantization(method="compressed-tensors")),
        (
            compressed("input_activations", dynamic=False),
            Quantization(method="compressed-tensors", static_activations=True),
        ),
        (
            compressed("weights", strategy="block", block_structure=[128, 128]),
            Quantization(method="compressed-tensors", block=(128, 128)),
        ),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 64},
            Quantization(method="awq", group_size=64),
        ),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": -1},
            Quantization(method="gptq", zero_offset=1),
        ),
        (
            {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"},
            Quantization(method="gptq", group_size=128),
        ),
    ],
)
def test_quantised_layouts_are_read(
    read: Read, stored: dict[str, Any], expected: Quantization
) -> None:
    assert read(LLAMA | {"quantization_config": stored}).quantization == expected
    assert read(LLAMA).quantization is None


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes'"),
        ({"quant_method": 8}, "quant_method must be a string"),
        ({"quant_method": "fp8", "activation_scheme": "magic"}, "activation_scheme 'magic'"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt 'e5m2'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size \[128\]"),
        (
            {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": [8, 8]},
            "static activations beside scales of blocks",
        ),
        (COMPRESSED | {"format": "pack-quantized"}, "format 'pack-quantized'"),
        (COMPRESSED | {"config_groups": {}}, "0 different config_groups"),
        (COMPRESSED | {"config_groups": {"group_0": 3}}, "group_0 must be an object"),
        (compressed("weights", type="int"), "8-bit int weights"),
        (compressed("weights", num_bits=4), "4-bit float weights"),
        (compressed("weights", strategy="group"), "strategy 'group'"),
        (compressed("input_activations", type="int"), "8-bit int input_activations"),
        ({"quant_method": "awq", "bits": 8}, "8-bit weights"),
        ({"quant_method": "awq", "version": "gemv"}, "version 'gemv'"),
        ({"quant_method": "awq", "zero_point": False}, "awq without zero_point"),
        ({"quant_method": "gptq", "bits": 3}, "3-bit weights"),
        ({"quant_method": "gptq", "group_size": 7}, "group_size 7"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
    ],
)
def test_a_quantisation_that_is_not_computed_is_refused_by_name(
    read: Read, stored: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read(LLAMA | {"quantization_config": stored})
