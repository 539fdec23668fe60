"""A pass over prompts whose last layer computes the rows that are sampled, and no others."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from cluster.startup import StartupReport
from engine import weights
from engine.batch import Batch, Samples
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.decoder_layer import DecoderLayer
from kernels.prefill_attention import prefill_attention

CPU = torch.device("cpu")
BLOCK_SIZE = 8
CONFIG = """{"architectures": ["Qwen3ForCausalLM"], "hidden_size": 32, "intermediate_size": 48,
"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
"vocab_size": 64, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
"torch_dtype": "float32", "tie_word_embeddings": true %s}"""
WINDOW = ', "use_sliding_window": true, "sliding_window": 6, "max_window_layers": 0'
LENGTHS = (5, 9, 20)


@pytest.fixture(params=["", WINDOW], ids=["full", "window"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(CONFIG % request.param)
    return ModelConfig.from_folder(folder)


@pytest.fixture
def decoder(model: ModelConfig) -> Decoder:
    made = Decoder(model, max_model_len=64, dtype=torch.float32, device=CPU)
    with StartupReport(sink=lambda fact: None).phase("fill", total=1) as phase:
        weights.fill_dummy(made.checkpoint_views(), 3, phase)
    made.pack()
    return made


def prompts() -> Batch:
    """One behind the other, each in blocks of its own; every token is sampled."""
    num_tokens, width = sum(LENGTHS), 4
    rows = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    return Batch(
        token_ids=torch.arange(num_tokens) * 5 % 64,
        positions=positions,
        slot_mapping=rows * width * BLOCK_SIZE + positions,
        samples=None,
        seq_lens=torch.tensor(LENGTHS, dtype=torch.int32),
        cu_seqlens_q=torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        block_tables=torch.arange(3 * width, dtype=torch.int32).view(3, width),
        num_samples=num_tokens,
        max_seqlen_q=max(LENGTHS),
        is_decode=False,
    )


def pool(model: ModelConfig) -> list[torch.Tensor]:
    shape = (12, 2, model.num_kv_heads, BLOCK_SIZE, model.head_size)
    return [torch.zeros(shape) for _ in range(model.num_layers)]


def sampled(*rows: int) -> Batch:
    """The last token of these rows."""
    ends = prompts().cu_seqlens_q[1:].long() - 1
    samples = Samples(ends[list(rows)], torch.tensor(rows, dtype=torch.int64))
    return replace(prompts(), samples=samples, num_samples=len(rows))


@torch.inference_mode()
@pytest.mark.parametrize("rows", [(0,), (2,), (0, 2), (0, 1, 2)])
def test_what_is_sampled_is_as_if_all_were(
    rows: tuple[int, ...], model: ModelConfig, decoder: Decoder
) -> None:
    batch = sampled(*rows)
    assert batch.samples is not None
    everything = decoder.forward(prompts(), expected_kv := pool(model))
    found = decoder.forward(batch, kv := pool(model))
    assert everything is not None
    assert found is not None
    torch.testing.assert_close(found, everything[batch.samples.indices], rtol=1e-5, atol=1e-6)
    assert all(map(torch.equal, kv, expected_kv))


@torch.inference_mode()
@pytest.mark.parametrize("rows", [(0,), (1, 2), (0, 1, 2)])
def test_the_last_tokens_of_prompts_see_what_was_computed_before(
    rows: tuple[int, ...], model: ModelConfig, decoder: Decoder
) -> None:
    everything = decoder.forward(whole := prompts(), kv := pool(model))
    lengths = torch.tensor([1, 4, 13])  # one as a decode step has it
    taken = torch.cat(
        [
            torch.arange(end - length, end)
            for end, length in zip(whole.cu_seqlens_q[1:].tolist(), lengths.tolist(), strict=True)
        ]
    )
    ends = lengths.cumsum(0)
    batch = replace(
        sampled(*rows),
        token_ids=whole.token_ids[taken],
        positions=whole.positions[taken],
        slot_mapping=whole.slot_mapping[taken],
        samples=Samples(ends[list(rows)] - 1, torch.tensor(rows)),
        cu_seqlens_q=torch.cat((torch.zeros(1), ends)).int(),
        max_seqlen_q=13,
    )
    found = decoder.forward(batch, kv)
    assert everything is not None
    assert found is not None
    expected = everything[whole.cu_seqlens_q[1:].long()[list(rows)] - 1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def test_a_pass_that_samples_nothing_writes_all_kv_and_attends_for_nobody_in_the_last_layer(
    model: ModelConfig, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder.forward(prompts(), expected_kv := pool(model))
    attend = Mock(wraps=prefill_attention)
    monkeypatch.setattr("engine.models.decoder_layer.prefill_attention", attend)
    assert decoder.forward(sampled(), kv := pool(model)) is None
    assert attend.call_count == model.num_layers - 1
    assert all(map(torch.equal, kv, expected_kv))


@torch.inference_mode()
def test_no_queries_are_kept_while_the_rest_of_a_layer_needs_memory(
    model: ModelConfig, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries: list[weakref.ref[torch.Tensor]] = []
    query, transform = DecoderLayer.query, DecoderLayer.transform

    def noted(layer: DecoderLayer, *args: Any) -> torch.Tensor:
        made = query(layer, *args)
        queries.append(weakref.ref(made))
        return made

    def checked(layer: DecoderLayer, *args: Any) -> torch.Tensor:
        assert queries
        assert all(each() is None for each in queries)
        return transform(layer, *args)

    monkeypatch.setattr(DecoderLayer, "query", noted)
    monkeypatch.setattr(DecoderLayer, "transform", checked)
    decoder.forward(sampled(0, 2), pool(model))
