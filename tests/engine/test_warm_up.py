"""Which steps are run before serving, and what they are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from engine.kv_cache import KVCache
from engine.limits import EngineLimits
from engine.sampler import Sampler
from engine.warm_up import prefill_batch, warm_up_sizes
from engine.workspace import run_largest_steps

if TYPE_CHECKING:
    import pytest

    from tests.engine.conftest import OpenEngine

CPU = torch.device("cpu")


def limits(device: str, most: int) -> EngineLimits:
    return EngineLimits(
        device=torch.device(device),
        dtype=torch.float32,
        kv_dtype=torch.float32,
        max_model_len=1024,
        max_num_seqs=8,
        max_graph_rows=8,
        max_num_batched_tokens=most,
        num_threads=1,
    )


def test_a_gpu_runs_both_sides_of_each_border_and_the_largest_step() -> None:
    assert warm_up_sizes(limits("cuda", 8)) == [1, 2, 3, 4, 5, 8]
    sizes = warm_up_sizes(limits("cuda", 1000))
    assert sizes[-1] == 1000
    assert {64, 65, 512, 513} <= set(sizes)
    assert sizes == sorted(set(sizes))


def test_a_cpu_compiles_nothing() -> None:
    assert warm_up_sizes(limits("cpu", 512)) == [1, 2]
    assert warm_up_sizes(limits("cpu", 1)) == [1]


def test_a_batch_of_prompts_samples_each_behind_its_context() -> None:
    kv_layer = torch.zeros(1, 2, 1, 8, 4)
    batch = prefill_batch(10, kv_layer, limits("cpu", 16), num_rows=3, context=20)
    lengths = [3, 3, 4]
    assert batch.cu_seqlens_q.tolist() == [0, 3, 6, 10]
    assert batch.seq_lens.tolist() == [20 + length for length in lengths]
    assert batch.positions.tolist() == [20 + i for length in lengths for i in range(length)]
    assert batch.samples is not None
    assert batch.samples.indices.tolist() == [2, 5, 9]
    assert batch.samples.rows.tolist() == [0, 1, 2]
    assert batch.max_seqlen_q == 4
    assert batch.block_tables.shape[1] * 8 >= 24


def test_more_tokens_than_one_prompt_may_have_are_several_prompts() -> None:
    batch = prefill_batch(3000, torch.zeros(1, 2, 1, 8, 4), limits("cpu", 4096))
    assert batch.seq_lens.tolist() == [1000, 1000, 1000]


def test_the_largest_steps_run_on_one_block_and_draw_with_everything_asked_for(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine("llama3", max_num_seqs=4, max_num_batched_tokens=64, max_model_len=256)
    sampler = Sampler(engine.model_config.vocab_size, CPU, max_rows=4)
    drawn: list[int] = []
    sample = sampler.sample

    def noted(logits: torch.Tensor, sequences: list[object]) -> object:
        drawn.append(len(sequences))
        return sample(logits, sequences)  # type: ignore[arg-type]

    monkeypatch.setattr(sampler, "sample", noted)
    one_block = KVCache.allocate(engine.kv_cache.layout, 1, CPU)
    with torch.inference_mode():
        run_largest_steps(engine._runner._decoder, one_block, engine.limits, sampler)
    assert drawn == [4]
    assert not one_block.tensor.any()  # padding slots: nothing is written
