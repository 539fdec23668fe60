from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.errors import ConfigError
from cluster.startup import StartupReport
from engine import checkpoint_files, weights
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    Tensors = dict[str, torch.Tensor]

CPU = torch.device("cpu")


@pytest.fixture
def folder(checkpoints: Path, tmp_path: Path) -> Path:
    """A copy of a sharded checkpoint, to be damaged."""
    return shutil.copytree(checkpoints / "qwen2", tmp_path / "model")


def build(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    config = ModelConfig.from_folder(folder)
    return Decoder(config, max_model_len=64, dtype=dtype, device=CPU)


def load(
    folder: Path, dtype: torch.dtype = torch.float32
) -> tuple[Tensors, list[Mapping[str, Any]]]:
    views = build(folder, dtype).checkpoint_views()
    facts: list[Mapping[str, Any]] = []
    with StartupReport(sink=facts.append).phase("load weights") as phase:
        weights.load_weights(checkpoint_files.open_checkpoint(folder), views, phase)
    return views, facts


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Apply `change` to the tensors of the shard that holds the first layer's q_proj."""
    index = json.loads((folder / checkpoint_files.INDEX_FILE).read_text())["weight_map"]
    path = folder / index["model.layers.0.self_attn.q_proj.weight"]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_merged_matrices_hold_the_checkpoints_tensors(folder: Path) -> None:
    views, _ = load(folder)
    stored: Tensors = {}
    for path in folder.glob("*.safetensors"):
        stored |= load_file(path)
    assert views.keys() == stored.keys() - {"lm_head.weight"}
    for name, view in views.items():
        assert torch.equal(view, stored[name]), name


def test_every_byte_of_the_model_is_reported_as_progress(folder: Path) -> None:
    views, facts = load(folder)
    advances = [fact["done"] for fact in facts if fact["event"] == "advance"]
    assert advances == sorted(advances)
    assert advances[0] > 0
    views, _ = load(folder)
    assert advances[-1] <= sum(map(weights.num_bytes, views.values()))


def test_another_type_than_the_checkpoints_is_converted(folder: Path) -> None:
    exact, _ = load(folder)
    rounded, _ = load(folder, torch.bfloat16)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(rounded[name], exact[name].bfloat16())


def test_a_folder_without_safetensors_is_refused(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"holds neither model\.safetensors nor"):
        checkpoint_files.open_checkpoint(folder)


def test_an_index_that_names_a_missing_file_is_refused(folder: Path) -> None:
    first_shard(folder).unlink()
    with pytest.raises(ConfigError, match="which is not in"):
        checkpoint_files.open_checkpoint(folder)


def test_an_index_cannot_point_outside_its_folder(folder: Path) -> None:
    index = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (folder / checkpoint_files.INDEX_FILE).write_text(json.dumps(index))
    shutil.copy(first_shard(folder), folder.parent / "elsewhere.safetensors")
    with pytest.raises(ConfigError, match="which is not in"):
        checkpoint_files.open_checkpoint(folder)


@pytest.mark.parametrize("num_bytes", [0, 5, 100, -1])
def test_a_truncated_file_is_named(folder: Path, num_bytes: int) -> None:
    path = first_shard(folder)
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(ConfigError, match=f"{path.name} is not a whole safetensors file"):
        checkpoint_files.open_checkpoint(folder)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop("model.layers.0.self_attn.q_proj.weight"))
    with pytest.raises(ConfigError, match=r"lacks model\.layers\.0\.self_attn\.q_proj\.weight"):
        load(folder)


def test_a_tensor_of_another_shape_is_named(folder: Path) -> None:
    def widen(tensors: Tensors) -> None:
        tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(64, 65)

    rewrite(folder, widen)
    with pytest.raises(ConfigError, match=r"q_proj\.weight has shape \[64, 65\].*\[64, 64\]"):
        load(folder)


def test_a_tensor_that_would_be_ignored_is_refused(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.extra.bias": torch.ones(1)}))
    with pytest.raises(ConfigError, match=r"does not use: model\.layers\.0\.extra\.bias"):
        load(folder)


def test_a_tensor_of_integers_is_refused(folder: Path) -> None:
    def quantize(tensors: Tensors) -> None:
        name = "model.layers.0.self_attn.q_proj.weight"
        tensors[name] = tensors[name].to(torch.int8)

    rewrite(folder, quantize)
    with pytest.raises(ConfigError, match="stored as I8; supported are BF16, F16, F32"):
        load(folder)


def fingerprint(folder: Path) -> str:
    return checkpoint_files.fingerprint(
        ModelConfig.from_folder(folder), checkpoint_files.open_checkpoint(folder)
    )


def test_fingerprints_differ_when_one_tensor_does(folder: Path) -> None:
    before = fingerprint(folder)
    assert before == fingerprint(folder)

    def change(tensors: Tensors) -> None:
        tensors["model.layers.0.self_attn.q_proj.weight"] += 1.0

    rewrite(folder, change)
    assert before != fingerprint(folder)


def test_fingerprints_differ_when_the_same_weights_compute_other_kv(folder: Path) -> None:
    before = fingerprint(folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 12345.0
    (folder / "config.json").write_text(json.dumps(config))
    assert before != fingerprint(folder)


def test_dummy_weights_are_seeded_and_of_a_realistic_scale(folder: Path) -> None:
    def draw(seed: int) -> Tensors:
        views = build(folder).checkpoint_views()
        with StartupReport(sink=lambda fact: None).phase("load weights") as phase:
            weights.fill_dummy(views, seed, phase)
        return views

    first, second, other = draw(1), draw(1), draw(2)
    name = "model.layers.0.mlp.gate_proj.weight"
    assert torch.equal(first[name], second[name])
    assert not torch.equal(first[name], other[name])
    assert first[name].std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(first["model.norm.weight"], torch.ones(64))
