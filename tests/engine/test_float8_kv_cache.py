"""An engine whose KV is in 8-bit floats: `--kv-cache-dtype fp8`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from cluster.errors import ConfigError
from cluster.startup import StartupReport
from engine import checkpoint_files, weights
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from tests.quantized_checkpoints import float8_by_tensor, write_pair

if TYPE_CHECKING:
    from pathlib import Path

    from engine.engine import Engine
    from tests.engine.conftest import Expected, OpenEngine, RunGreedy
    from tests.quantized_checkpoints import Tensors

FP8_NAMES = ("fp8", "fp8_e4m3")
FP8_MODEL = {"quant_method": "fp8", "activation_scheme": "dynamic"}


def tokens_of(engine: Engine, run_greedy: RunGreedy, prompts: list[list[int]]) -> list[list[int]]:
    sequences = run_greedy(engine, prompts, chunk=64, num_tokens=24)
    return [sequence.output_token_ids for sequence in sequences]


def test_a_block_takes_a_quarter_of_the_bytes_of_float32(open_engine: OpenEngine) -> None:
    plain, float8 = open_engine("qwen3"), open_engine("qwen3", kv_cache_dtype="fp8")
    assert float8.kv_cache.layout.block_bytes * 4 == plain.kv_cache.layout.block_bytes
    assert float8.kv_cache.layout.dtype == torch.float8_e4m3fn


def test_both_names_of_the_type_mean_the_same(open_engine: OpenEngine) -> None:
    layouts = [open_engine("qwen3", kv_cache_dtype=name).kv_cache.layout for name in FP8_NAMES]
    assert layouts[0] == layouts[1]


def test_nodes_with_other_kv_are_not_compatible(open_engine: OpenEngine) -> None:
    plain, float8 = open_engine("qwen3"), open_engine("qwen3", kv_cache_dtype="fp8")
    assert plain.weights_fingerprint == float8.weights_fingerprint
    keys = {
        each.kv_cache.layout.compatibility_hash(each.weights_fingerprint, 1)
        for each in (plain, float8)
    }
    assert len(keys) == 2


@pytest.mark.parametrize("family", ["llama3", "qwen2_yarn_windows", "qwen3", "pocket_model"])
def test_most_tokens_are_those_of_exact_kv(
    family: str, expected: Expected, open_engine: OpenEngine, run_greedy: RunGreedy
) -> None:
    cases = expected[family]
    engine = open_engine(family, kv_cache_dtype="fp8")
    sequences = run_greedy(engine, [c["prompt"] for c in cases], chunk=1024, num_tokens=1)
    same = [
        sequence.output_token_ids[0] == case["tokens"][0]
        for sequence, case in zip(sequences, cases, strict=True)
    ]
    assert sum(same) >= 12


def test_tokens_do_not_depend_on_the_prefix_cache_or_on_chunks(
    expected: Expected, open_engine: OpenEngine, run_greedy: RunGreedy
) -> None:
    prompts = [case["prompt"] for case in expected["llama3"]]
    engine = open_engine("llama3", kv_cache_dtype="fp8")
    first = tokens_of(engine, run_greedy, prompts)
    assert tokens_of(engine, run_greedy, prompts) == first
    uncached = open_engine("llama3", kv_cache_dtype="fp8", enable_prefix_caching=False)
    for prompt, tokens in zip(prompts[:6], first, strict=False):
        (sequence,) = run_greedy(uncached, [prompt], chunk=32, num_tokens=24)
        assert sequence.output_token_ids == tokens


def scales_of(folder: Path, kv_dtype: torch.dtype) -> list[list[list[float]]]:
    """`[layer][keys, values][head]` as loaded."""
    config = ModelConfig.from_folder(folder)
    decoder = Decoder(
        config,
        max_model_len=64,
        dtype=torch.float32,
        device=torch.device("cpu"),
        kv_dtype=kv_dtype,
    )
    views = decoder.checkpoint_views()
    with StartupReport(sink=lambda fact: None).phase("load weights") as phase:
        weights.load_weights(
            checkpoint_files.open_checkpoint(folder), views, phase, config.quantization
        )
    names = [name.removesuffix("k_scale") for name in views if name.endswith("k_scale")]
    return [[views[f"{name}{side}_scale"].tolist() for side in "kv"] for name in names]


@pytest.mark.parametrize(
    ("names", "expected_scales"),
    [
        ({}, [[1.0, 1.0], [1.0, 1.0]]),
        ({"k_scale": 0.5, "v_scale": 0.25}, [[0.5, 0.5], [0.25, 0.25]]),
        ({"k_proj.k_scale": 0.5, "v_proj.v_scale": 2.0}, [[0.5, 0.5], [2.0, 2.0]]),
        ({"k_proj.output_scale": 0.5, "v_proj.output_scale": 2.0}, [[0.5, 0.5], [2.0, 2.0]]),
        ({"kv_scale": 0.5}, [[0.5, 0.5], [0.5, 0.5]]),
        ({"k_scale": [0.5, 0.75], "v_scale": [1.0, 2.0]}, [[0.5, 0.75], [1.0, 2.0]]),
    ],
)
def test_scales_of_the_checkpoint_are_found_under_every_name(
    names: dict[str, Any],
    expected_scales: list[list[float]],
    checkpoints: Path,
    tmp_path: Path,
) -> None:
    pair = write_pair(
        checkpoints / "qwen2", tmp_path, float8_by_tensor, FP8_MODEL, more=of_layer_0(names)
    )
    first, *others = scales_of(pair.quantized, torch.float8_e4m3fn)
    assert first == expected_scales
    assert others
    assert all(each == [[1.0, 1.0], [1.0, 1.0]] for each in others)
    # Without 8-bit KV they are of no use, and no error.
    assert scales_of(pair.quantized, torch.float32) == []


def of_layer_0(names: dict[str, Any]) -> Tensors:
    return {
        f"model.layers.0.self_attn.{name}": torch.tensor(value) for name, value in names.items()
    }


def test_what_a_scale_makes_too_large_saturates(
    checkpoints: Path, tmp_path: Path, open_engine: OpenEngine, run_greedy: RunGreedy
) -> None:
    scales = of_layer_0({"k_scale": 1e-3, "v_scale": 1e-3})
    pair = write_pair(checkpoints / "qwen2", tmp_path, float8_by_tensor, FP8_MODEL, more=scales)
    saturated = open_engine(str(pair.quantized), kv_cache_dtype="fp8")
    exact = open_engine(str(pair.plain))
    for engine in (saturated, exact):
        tokens_of(engine, run_greedy, [list(range(3, 40))])
    assert 0.448 < exact.kv_cache.layers[0].abs().max() < 448.0
    assert saturated.kv_cache.layers[0].float().abs().max() == 448.0
    assert saturated.kv_cache.layers[1].float().abs().max() < 448.0


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"k_scale": -1.0, "v_scale": 1.0}, r"k_scale is not a positive number"),
        ({"k_scale": [1.0, 1.0, 1.0], "v_scale": 1.0}, "3 scales for 2 key/value heads"),
        ({"k_scale": 1, "v_scale": 1.0}, "k_scale is stored as I64"),
    ],
)
def test_unusable_scales_are_refused(
    names: dict[str, Any],
    message: str,
    checkpoints: Path,
    tmp_path: Path,
    open_engine: OpenEngine,
) -> None:
    pair = write_pair(
        checkpoints / "qwen2", tmp_path, float8_by_tensor, FP8_MODEL, more=of_layer_0(names)
    )
    with pytest.raises(ConfigError, match=message):
        open_engine(str(pair.quantized), kv_cache_dtype="fp8")


def test_other_scales_of_kv_make_another_model(
    checkpoints: Path, tmp_path: Path, open_engine: OpenEngine
) -> None:
    fingerprints = set()
    for scale in (0.5, 0.25):
        more = of_layer_0({"k_scale": scale, "v_scale": scale})
        pair = write_pair(
            checkpoints / "qwen2", tmp_path / str(scale), float8_by_tensor, FP8_MODEL, more=more
        )
        fingerprints.add(open_engine(str(pair.quantized)).weights_fingerprint)
    assert len(fingerprints) == 2
