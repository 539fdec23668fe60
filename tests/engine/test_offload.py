"""Layers in main memory: which, how they are laid out, and that a pass over them is the same."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
import torch

from cluster.errors import ConfigError
from cluster.startup import StartupReport
from engine import weights
from engine.batch import Batch
from engine.config import EngineConfig
from engine.limits import Machine, resolve
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.linear import Linear
from engine.models.quantization import Quantization
from engine.models.quantized_linear import matrix_factory
from engine.offload import GIB, OffloadedLayers, offloaded_layers

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")
NUM_TOKENS, BLOCK_SIZE = 20, 8
STATIC_FLOAT8 = Quantization(method="fp8", static_activations=True)
CONFIG = """{"architectures": ["Qwen3ForCausalLM"], "hidden_size": 32, "intermediate_size": 48,
"num_hidden_layers": 7, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
"vocab_size": 64, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
"torch_dtype": "float32", "tie_word_embeddings": true}"""


@pytest.fixture(autouse=True)
def _plain_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: what oneDNN packs has no bytes that could be moved."""
    monkeypatch.setattr("engine.models.linear.can_pack", lambda *_: False)


@pytest.fixture
def model(tmp_path: Path) -> ModelConfig:
    (tmp_path / "config.json").write_text(CONFIG)
    return ModelConfig.from_folder(tmp_path)


def build(
    model: ModelConfig,
    offloaded: OffloadedLayers | None = None,
    quantization: Quantization | None = None,
) -> Decoder:
    decoder = Decoder(
        model,
        max_model_len=64,
        dtype=torch.float32,
        device=CPU,
        make_matrix=matrix_factory(quantization, frozenset(), dtype=torch.float32, device=CPU),
        offloaded=offloaded,
    )
    views = decoder.checkpoint_views()
    with StartupReport(sink=lambda fact: None).phase("fill", total=1) as phase:
        weights.fill_dummy(views, 3, phase)
    decoder.pack()
    return decoder


def run(decoder: Decoder, model: ModelConfig) -> torch.Tensor:
    num_blocks = -(-NUM_TOKENS // BLOCK_SIZE)
    shape = (num_blocks, 2, model.num_kv_heads, BLOCK_SIZE, model.head_size)
    steps = torch.arange(NUM_TOKENS)
    batch = Batch(
        token_ids=steps * 3 % model.vocab_size,
        positions=steps,
        slot_mapping=steps,
        samples=None,
        seq_lens=torch.tensor([NUM_TOKENS], dtype=torch.int32),
        cu_seqlens_q=torch.tensor([0, NUM_TOKENS], dtype=torch.int32),
        block_tables=torch.arange(num_blocks, dtype=torch.int32)[None],
        num_samples=NUM_TOKENS,
        max_seqlen_q=NUM_TOKENS,
        is_decode=False,
    )
    with torch.inference_mode():
        hidden = decoder.forward(batch, [torch.zeros(shape) for _ in range(model.num_layers)])
        assert hidden is not None
        return decoder.logits(hidden)


@pytest.mark.parametrize("quantization", [None, STATIC_FLOAT8], ids=["plain", "float8"])
@pytest.mark.parametrize("indices", [(0,), (0, 1, 2), (1, 3, 5), tuple(range(7))])
def test_a_pass_over_offloaded_layers_computes_the_same(
    indices: tuple[int, ...], quantization: Quantization | None, model: ModelConfig
) -> None:
    expected = run(build(model, None, quantization), model)
    assert expected.std() > 0.01
    decoder = build(model, OffloadedLayers(dict.fromkeys(indices, 1), CPU), quantization)
    for _ in range(2):  # the second pass finds the buffers as the first left them
        assert torch.equal(run(decoder, model), expected)


def test_two_buffers_are_all_that_offloaded_layers_keep_on_the_device(model: ModelConfig) -> None:
    offloaded = OffloadedLayers(dict.fromkeys(range(7), 1), CPU)
    decoder = build(model, offloaded)
    per_layer = decoder.layer_bytes()
    assert offloaded.host_bytes >= sum(per_layer)
    storages = {
        slot.untyped_storage().data_ptr()
        for layer in decoder._layers
        for matrix in layer.matrices()
        if isinstance(matrix, Linear)
        for slot in [matrix.weight]
    }
    assert len(storages) == 2
    assert offloaded.buffer_bytes < 2 * 1.05 * max(per_layer)


def test_views_of_one_storage_stay_views_of_one_storage(model: ModelConfig) -> None:
    class Transposed(Linear):
        __slots__ = ("turned",)

        def pack(self, *, keep_weight: bool = False) -> None:
            self.turned = self.weight.t()

    decoder = Decoder(
        model,
        max_model_len=64,
        dtype=torch.float32,
        device=CPU,
        offloaded=OffloadedLayers({2: 1}, CPU),
        make_matrix=lambda spec: Transposed.empty(spec, dtype=torch.float32, device=CPU),
    )
    down = decoder._layers[2].down
    assert isinstance(down, Transposed)
    for view in decoder.checkpoint_views().values():
        view.normal_()
    filled = down.weight.clone()
    decoder.pack()
    run(decoder, model)
    assert torch.equal(down.weight, filled)
    assert torch.equal(down.turned, filled.t())
    assert down.turned.untyped_storage().data_ptr() == down.weight.untyped_storage().data_ptr()


@pytest.mark.parametrize("gib", [0.1, 1.0, 4.0, 5.9])
def test_the_fewest_layers_that_free_what_is_asked_are_chosen(gib: float) -> None:
    layers = [GIB // 2] * 14
    chosen = offloaded_layers(gib, layers)
    freed = (len(chosen) - 2) * 0.5
    assert gib <= freed < gib + 0.5
    gaps = {later - earlier for earlier, later in pairwise(chosen)}
    assert max(gaps) - min(gaps) <= 1
    assert set(chosen) <= set(range(14))


def test_on_a_cpu_there_is_nothing_to_offload_to(model: ModelConfig, tmp_path: Path) -> None:
    config = EngineConfig(model=tmp_path, device="cpu", cpu_offload_gb=1.0)
    with pytest.raises(ConfigError, match=r"^--cpu-offload-gb .* main memory already") as refused:
        resolve(config, model, Machine(0, cpu_is_fast_at_bfloat16=False))
    assert "\n" not in refused.value.message


def test_nothing_is_offloaded_unless_asked() -> None:
    assert offloaded_layers(0.0, [GIB] * 4) == ()


def test_more_than_the_layers_hold_is_refused_with_what_can_be_freed() -> None:
    with pytest.raises(ConfigError, match=r"--cpu-offload-gb 3 .* can free: 2\.00, beside two"):
        offloaded_layers(3.0, [GIB] * 4)
