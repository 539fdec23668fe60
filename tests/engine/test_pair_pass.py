"""A step of some 250 sequences by `pair_mlp` computes what an ordinary step does."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from cluster.startup import StartupReport
from engine import weights
from engine.batch import Batch
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.pair_pass import PairPass, mlp_of

if TYPE_CHECKING:
    from pathlib import Path

BLOCK_SIZE, BLOCKS_EACH = 8, 3
CONFIG = """{"architectures": ["%s"], "hidden_size": 512, "intermediate_size": 13568,
"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
"vocab_size": 128, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
"torch_dtype": "float32", "tie_word_embeddings": true}"""
FAMILIES = ["LlamaForCausalLM", "Qwen2ForCausalLM"]  # without and with a bias of queries


def build(folder: Path, family: str, device: str, dtype: torch.dtype) -> Decoder:
    (folder / "config.json").write_text(CONFIG % family)
    decoder = Decoder(
        ModelConfig.from_folder(folder), max_model_len=64, dtype=dtype, device=torch.device(device)
    )
    with StartupReport(sink=lambda fact: None).phase("fill", total=1) as phase:
        weights.fill_dummy(decoder.checkpoint_views(), 3, phase)
    decoder.pack()
    return decoder


def step(num_rows: int, device: str) -> Batch:
    """Sequences of 1 to 24 tokens."""
    lens = torch.arange(num_rows) % (BLOCK_SIZE * BLOCKS_EACH) + 1
    tables = torch.randperm(num_rows * BLOCKS_EACH, generator=torch.Generator().manual_seed(2))
    tables = tables.view(num_rows, BLOCKS_EACH).int()
    last = lens - 1
    blocks = tables.gather(1, last[:, None] // BLOCK_SIZE).squeeze(1)
    return Batch(
        token_ids=(torch.arange(num_rows) * 7 % 128).to(device),
        positions=last.to(device),
        slot_mapping=(blocks.long() * BLOCK_SIZE + last % BLOCK_SIZE).to(device),
        samples=None,
        seq_lens=lens.int().to(device),
        cu_seqlens_q=torch.arange(num_rows + 1, dtype=torch.int32, device=device),
        block_tables=tables.to(device),
        num_samples=num_rows,
        max_seqlen_q=1,
        is_decode=True,
    )


def run(decoder: Decoder, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Logits, the pool afterwards, and the layers told of."""
    model = decoder.config
    num_blocks = batch.block_tables.numel()
    shape = (model.num_layers, num_blocks, 2, model.num_kv_heads, BLOCK_SIZE, model.head_size)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    pool = values.to(batch.seq_lens.device, decoder._norm.dtype)
    told: list[int] = []
    with torch.inference_mode():
        hidden = decoder.forward(batch, list(pool.unbind()), told.append)
        assert hidden is not None
        return decoder.logits(hidden).float(), pool.float(), told


def paired(decoder: Decoder) -> PairPass:
    """Where `of` would not take it."""
    mlps = [mlp for layer in decoder._layers if (mlp := mlp_of(layer)) is not None]
    return PairPass(decoder._layers, mlps)


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_logits_and_keys_on_a_cpu(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.models.linear.can_pack", lambda *_: False)
    decoder = build(tmp_path, family, "cpu", torch.float32)
    assert decoder._pair_pass is None
    batch = step(240, "cpu")
    expected = run(decoder, batch)
    decoder._pair_pass = paired(decoder)
    logits, pool, told = run(decoder, batch)
    assert expected[0].std() > 0.01
    assert not torch.equal(logits, expected[0])  # it is summed in another order
    assert distance(logits, expected[0]) < 1e-5
    assert distance(pool, expected[1]) < 1e-6
    assert told == expected[2] == [0, 1, 2]


def test_it_takes_steps_of_two_tiles_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.models.linear.can_pack", lambda *_: False)
    own = paired(build(tmp_path, FAMILIES[0], "cpu", torch.float32))
    taken = [rows for rows in range(8, 320, 8) if own.takes(step(rows, "cpu"))]
    assert taken == [240, 248, 256]
    assert not own.takes(replace(step(256, "cpu"), is_decode=False))


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_logits_and_keys_on_a_gpu(family: str, tmp_path: Path) -> None:
    decoder = build(tmp_path, family, "cuda", torch.bfloat16)
    assert decoder._pair_pass is not None
    for num_rows in (241, 256):
        batch = step(num_rows, "cuda")
        logits, pool, _ = run(decoder, batch)
        again, _, _ = run(decoder, batch)
        paired, decoder._pair_pass = decoder._pair_pass, None
        expected = run(decoder, batch)
        decoder._pair_pass = paired
        assert torch.equal(logits, again)
        assert distance(logits, expected[0]) < 0.03
        assert distance(pool, expected[1]) < 0.01
