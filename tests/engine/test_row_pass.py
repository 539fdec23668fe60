"""A step of one sequence by a kernel for each layer computes what an ordinary step does."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from cluster.startup import StartupReport
from engine import weights
from engine.batch import Batch
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.linear import Linear, MatrixSpec
from engine.models.quantization import ON_LOAD, Quantization
from engine.models.quantized_linear import matrix_factory
from engine.models.row_pass import RowPass, halves_of, row_matrix
from engine.tensor_parallel.shard import Shard
from engine.tensor_parallel.sharded import sharded_factory
from kernels.row_layer import row_layer

if TYPE_CHECKING:
    from pathlib import Path

CONTEXT, BLOCK_SIZE, NUM_BLOCKS = 37, 8, 9
CONFIG = """{"architectures": ["%s"], "hidden_size": 256, "intermediate_size": 640,
"num_hidden_layers": %d, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
"vocab_size": 128, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
"torch_dtype": "float32", "tie_word_embeddings": true}"""
# With nothing between heads and rotation, with biases there, with a norm.
FAMILIES = ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]


def build(
    folder: Path,
    family: str,
    device: str,
    dtype: torch.dtype,
    *,
    num_layers: int = 3,
    quantization: Quantization | None = None,
) -> Decoder:
    (folder / "config.json").write_text(CONFIG % (family, num_layers))
    place: dict[str, Any] = {"dtype": dtype, "device": torch.device(device)}
    decoder = Decoder(
        ModelConfig.from_folder(folder),
        max_model_len=64,
        make_matrix=matrix_factory(quantization, frozenset(), **place),
        kv_dtype=torch.float8_e4m3fn if quantization is not None else dtype,
        **place,
    )
    with StartupReport(sink=lambda fact: None).phase("fill", total=1) as phase:
        weights.fill_dummy(decoder.checkpoint_views(), 3, phase)
    decoder.pack()
    return decoder


def one_token(device: str) -> Batch:
    blocks = torch.tensor([[7, 2, 5, 1, 8]], dtype=torch.int32, device=device)
    last = CONTEXT - 1
    return Batch(
        token_ids=torch.tensor([77], device=device),
        positions=torch.tensor([last], device=device),
        slot_mapping=torch.tensor([8 * BLOCK_SIZE + last % BLOCK_SIZE], device=device),
        samples=None,
        seq_lens=torch.tensor([CONTEXT], dtype=torch.int32, device=device),
        cu_seqlens_q=torch.tensor([0, 1], dtype=torch.int32, device=device),
        block_tables=blocks,
        num_samples=1,
        max_seqlen_q=1,
        is_decode=True,
    )


def run(
    decoder: Decoder, device: str, *, fails_at: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Logits, the pool afterwards, and the layers told of. `fails_at`: a layer."""
    model = decoder.config
    shape = (model.num_layers, NUM_BLOCKS, 2, model.num_kv_heads, BLOCK_SIZE, model.head_size)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    kv_scales = decoder._layers[0].kv_scales
    kv_dtype = decoder._norm.dtype if kv_scales is None else torch.float8_e4m3fn
    pool = values.to(device, kv_dtype)
    told: list[int] = []

    def tell(layer: int) -> None:
        if layer == fails_at:
            raise MemoryError
        told.append(layer)

    with torch.inference_mode():
        hidden = decoder.forward(one_token(device), list(pool.unbind()), tell)
        assert hidden is not None
        return decoder.logits(hidden).float(), pool.float(), told


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_logits_and_keys_on_a_cpu(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.models.linear.can_pack", lambda *_: False)
    decoder = build(tmp_path, family, "cpu", torch.float32)
    assert decoder._row_pass is None
    expected = run(decoder, "cpu")
    halves = [halves_of(layer) for layer in decoder._layers]
    decoder._row_pass = RowPass(decoder._layers, [half for half in halves if half is not None])
    logits, pool, told = run(decoder, "cpu")
    assert expected[0].std() > 0.01
    assert distance(logits, expected[0]) < 1e-5
    assert distance(pool, expected[1]) < 1e-6
    assert told == expected[2] == [0, 1, 2]


def test_a_layer_finds_its_counters_clean_after_a_pass_that_broke_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        *_, counters, idle_counters, _ = arguments
        assert not counters.any(), "its programs would not wait for each other"
        counters += 1
        idle_counters.zero_()
        return row_layer(*arguments)

    monkeypatch.setattr("engine.models.linear.can_pack", lambda *_: False)
    monkeypatch.setattr("engine.models.row_pass.row_layer", counted)
    decoder = build(tmp_path, FAMILIES[0], "cpu", torch.float32)
    halves = [halves_of(layer) for layer in decoder._layers]
    decoder._row_pass = RowPass(decoder._layers, [half for half in halves if half is not None])
    for fails_at in (1, 2):
        with pytest.raises(MemoryError):
            run(decoder, "cpu", fails_at=fails_at)
        run(decoder, "cpu")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("has_bias", [False, True])
def test_ranks_agree_on_a_matrix_whose_bias_only_the_first_adds(rank: int, has_bias: bool) -> None:
    """Ranks of which one alone took the kernel for a layer would wait for each other for ever."""
    ranks: Any = SimpleNamespace(shard=Shard(rank, 2))
    make = partial(Linear.empty, dtype=torch.float32, device=torch.device("cpu"))
    matrix = sharded_factory(make, ranks)(MatrixSpec({"x.o_proj": 8}, 4, has_bias))
    assert (row_matrix(matrix) is None) == has_bias


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", [None, ON_LOAD], ids=["plain", "float8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_logits_and_keys_on_a_gpu(
    family: str, quantization: Quantization | None, tmp_path: Path
) -> None:
    decoder = build(tmp_path, family, "cuda", torch.bfloat16, quantization=quantization)
    assert decoder._row_pass is not None
    logits, pool, _ = run(decoder, "cuda")
    again, _, _ = run(decoder, "cuda")
    decoder._row_pass = None
    expected = run(decoder, "cuda")
    assert torch.equal(logits, again)
    assert distance(logits, expected[0]) < 0.03
    assert distance(pool, expected[1]) < 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_pass_that_broke_off_spoils_none_that_follows(fails_at: int, tmp_path: Path) -> None:
    decoder = build(tmp_path, FAMILIES[0], "cuda", torch.bfloat16)
    assert decoder._row_pass is not None
    expected, _, _ = run(decoder, "cuda")
    for _ in range(20):
        with pytest.raises(MemoryError):
            run(decoder, "cuda", fails_at=fails_at)
        logits, _, _ = run(decoder, "cuda")
        assert torch.equal(logits, expected)


@pytest.mark.gpu
def test_a_single_layer_takes_ordinary_steps(tmp_path: Path) -> None:
    """Its counters would be cleaned while they are used."""
    decoder = build(tmp_path, "LlamaForCausalLM", "cuda", torch.bfloat16, num_layers=1)
    assert decoder._row_pass is None
