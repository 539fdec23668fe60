from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import ConfigError
from engine.config import EngineConfig
from engine.limits import EngineLimits, Machine, resolve
from engine.models.config import ModelConfig

ResolveLimits = Callable[..., EngineLimits]
SLOW_CPU = Machine(num_gpus=0, cpu_is_fast_at_bfloat16=False)
FAST_CPU = Machine(num_gpus=0, cpu_is_fast_at_bfloat16=True)
TWO_GPUS = Machine(num_gpus=2, cpu_is_fast_at_bfloat16=True)


@pytest.fixture
def limits(tmp_path: Path) -> ResolveLimits:
    def limits(
        machine: Machine,
        stored: str = "bfloat16",
        quantized: dict[str, Any] | None = None,
        rank: int = 0,
        head_size: int | None = None,
        **options: Any,
    ) -> EngineLimits:
        facts = {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "vocab_size": 64,
            "max_position_embeddings": 2048,
            "torch_dtype": stored,
            "quantization_config": quantized,
            "head_dim": head_size,
        }
        (tmp_path / "config.json").write_text(json.dumps(facts))
        model = ModelConfig.from_folder(tmp_path)
        return resolve(EngineConfig(model=tmp_path, **options), model, machine, rank=rank)

    return limits


def test_each_rank_has_the_next_gpu(limits: ResolveLimits) -> None:
    devices = [
        limits(TWO_GPUS, rank=rank, device="cuda", tensor_parallel_size=2).device
        for rank in range(2)
    ]
    assert devices == [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert limits(SLOW_CPU, rank=1, tensor_parallel_size=2).device == torch.device("cpu")


@pytest.mark.parametrize("device", ["auto", "cuda:1"])
def test_more_ranks_than_gpus_are_refused(device: str, limits: ResolveLimits) -> None:
    with pytest.raises(ConfigError, match="this process sees 2 GPUs"):
        limits(TWO_GPUS, device=device, tensor_parallel_size=2 + (device == "auto"))


@pytest.mark.parametrize(
    ("machine", "stored", "dtype"),
    [
        (TWO_GPUS, "bfloat16", torch.bfloat16),
        (TWO_GPUS, "float16", torch.float16),
        (TWO_GPUS, "float32", torch.float32),
        (FAST_CPU, "bfloat16", torch.bfloat16),
        (FAST_CPU, "float16", torch.float32),
        (SLOW_CPU, "bfloat16", torch.float32),
        (SLOW_CPU, "float32", torch.float32),
    ],
)
def test_auto_keeps_the_checkpoints_type_where_the_processor_is_fast_at_it(
    limits: ResolveLimits, machine: Machine, stored: str, dtype: torch.dtype
) -> None:
    assert limits(machine, stored).dtype == dtype


def test_a_given_type_wins(limits: ResolveLimits) -> None:
    assert limits(SLOW_CPU, "float32", dtype="bfloat16").dtype == torch.bfloat16


def test_kv_is_of_the_same_type_unless_8_bits_are_asked_for(limits: ResolveLimits) -> None:
    assert limits(SLOW_CPU, "float32").kv_dtype == torch.float32
    assert limits(TWO_GPUS, "float16").kv_dtype == torch.float16
    for name in ("fp8", "fp8_e4m3"):
        both = limits(TWO_GPUS, kv_cache_dtype=name)
        assert (both.dtype, both.kv_dtype) == (torch.bfloat16, torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("quantized", "options", "message"),
    [
        (None, {"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8 needs GPUs"),
        ({"quant_method": "fp8"}, {}, "in 8-bit floats needs GPUs"),
    ],
)
def test_a_gpu_without_8_bit_floats_says_so_at_once(
    limits: ResolveLimits,
    quantized: dict[str, str] | None,
    options: dict[str, str],
    message: str,
) -> None:
    old = Machine(num_gpus=1, cpu_is_fast_at_bfloat16=True, gpus_have_float8=False)
    with pytest.raises(ConfigError, match=f"{message} of compute capability 8.9"):
        limits(old, quantized=quantized, **options)
    limits(old, quantized=quantized, device="cpu", **options)  # a CPU reads it anyhow
    limits(old, quantized={"quant_method": "awq", "bits": 4})


def test_auto_takes_a_gpu_when_there_is_one(limits: ResolveLimits) -> None:
    assert limits(TWO_GPUS).device == torch.device("cuda", 0)
    assert limits(FAST_CPU).device == torch.device("cpu")
    assert limits(TWO_GPUS, device="cpu").device == torch.device("cpu")
    assert limits(TWO_GPUS, device="cuda:1").device == torch.device("cuda", 1)


def test_a_gpu_that_is_not_there_is_refused(limits: ResolveLimits) -> None:
    with pytest.raises(ConfigError, match="this process sees 2 GPUs"):
        limits(TWO_GPUS, device="cuda:2")


def test_a_step_is_smaller_on_a_cpu_unless_told_otherwise(limits: ResolveLimits) -> None:
    assert limits(TWO_GPUS).max_num_batched_tokens == 8192
    assert limits(FAST_CPU).max_num_batched_tokens == 512
    assert limits(FAST_CPU, max_num_batched_tokens=64).max_num_batched_tokens == 64


def test_a_step_that_no_launch_has_programs_for_is_refused(limits: ResolveLimits) -> None:
    with pytest.raises(ConfigError, match="at most 65535"):
        limits(TWO_GPUS, max_num_batched_tokens=65536)
    assert limits(FAST_CPU, max_num_batched_tokens=65536).max_num_batched_tokens == 65536


def test_a_step_is_no_larger_than_all_its_sequences_can_be(limits: ResolveLimits) -> None:
    for asked in (None, 65536):
        few = limits(TWO_GPUS, max_num_seqs=2, max_model_len=100, max_num_batched_tokens=asked)
        assert few.max_num_batched_tokens == 200


def test_a_small_model_on_a_cpu_runs_on_one_thread_unless_told_otherwise(
    limits: ResolveLimits,
) -> None:
    assert limits(FAST_CPU).num_threads == 1
    assert limits(FAST_CPU, num_threads=4).num_threads == 4
    assert limits(TWO_GPUS).num_threads is None


def test_the_context_is_the_models_unless_a_shorter_one_is_asked(limits: ResolveLimits) -> None:
    assert limits(FAST_CPU).max_model_len == 2048
    assert limits(FAST_CPU, max_model_len=100).max_model_len == 100
    with pytest.raises(ConfigError, match="--max-model-len 4096 exceeds the 2048 tokens"):
        limits(FAST_CPU, max_model_len=4096)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"device": "tpu"}, "--device must be auto, cpu, cuda or cuda:N"),
        ({"device": "cuda:x"}, "--device must be"),
        ({"gpu_memory_utilization": 1.5}, r"--gpu-memory-utilization must be in \(0, 1\]"),
        ({"block_size": 12}, "--block-size must be 8, 16, 32, 64 or 128"),
        ({"max_num_seqs": 0}, "--max-num-seqs must be at least 1"),
        ({"max_num_seqs": 1 << 63}, "--max-num-seqs must be at most 65536"),
        ({"kv_offloading_size": 1e300}, "--kv-offloading-size must be in"),
        ({"cpu_offload_gb": -1.0}, "--cpu-offload-gb must be in"),
        ({"num_threads": 1 << 31}, "--num-threads must be at most 1024"),
        ({"max_model_len": 0}, "--max-model-len must be at least 1"),
    ],
)
def test_an_option_out_of_range_is_refused(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(model=Path("model"), **option)


HOPPER = Machine(num_gpus=1, cpu_is_fast_at_bfloat16=True, capability=(9, 0))
BLACKWELL = Machine(num_gpus=1, cpu_is_fast_at_bfloat16=True, capability=(10, 0))


@pytest.mark.parametrize(
    ("machine", "stored", "head_size", "backend"),
    [
        (HOPPER, "bfloat16", 128, "gluon"),
        (HOPPER, "float16", 64, "gluon"),
        (HOPPER, "float32", 128, "triton"),
        (HOPPER, "bfloat16", 96, "triton"),
        (BLACKWELL, "bfloat16", 128, "triton"),
        (TWO_GPUS, "bfloat16", 128, "triton"),
        (FAST_CPU, "bfloat16", 128, None),
    ],
)
def test_the_fastest_attention_that_runs_is_chosen(
    limits: ResolveLimits, machine: Machine, stored: str, head_size: int, backend: str | None
) -> None:
    assert limits(machine, stored, head_size=head_size).attention_backend == backend


def test_attention_that_is_asked_for_wins(limits: ResolveLimits) -> None:
    chosen = limits(HOPPER, head_size=128, attention_backend="triton")
    assert chosen.attention_backend == "triton"


@pytest.mark.parametrize(
    ("machine", "stored", "asked", "needs"),
    [
        (
            BLACKWELL,
            "bfloat16",
            "gluon",
            r"a GPU of compute capability 9\.0 .* 10\.0\) and heads of",
        ),
        (HOPPER, "float32", "gluon", "a model in bfloat16 or float16 .* float32"),
        (HOPPER, "bfloat16", "gluon", r"heads of 64 or 128 \(these have 96\)"),
        (FAST_CPU, "bfloat16", "gluon", r"a GPU\."),
        (FAST_CPU, "bfloat16", "triton", r"a GPU\."),
    ],
)
def test_attention_that_cannot_run_is_refused_with_the_reason(
    limits: ResolveLimits, machine: Machine, stored: str, asked: str, needs: str
) -> None:
    with pytest.raises(ConfigError, match=f"--attention-backend {asked} needs {needs}") as refused:
        limits(machine, stored, head_size=96, attention_backend=asked)
    assert refused.value.param == "attention_backend"
