from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import ConfigError
from engine import memory
from engine.config import EngineConfig
from engine.kv_cache import KVLayout
from engine.memory import GIB, GpuMemory, KVNeed

# The shape of Llama-3.1-8B: 131,072 bytes of KV per token.
NEED = KVNeed(block_bytes=16 * 131_072, block_size=16, max_model_len=8192, max_num_seqs=256)


def config(**options: Any) -> EngineConfig:
    return EngineConfig(model=Path("model"), **options)


def gpu(**facts: int) -> GpuMemory:
    defaults = {"total": 80 * GIB, "free": 64 * GIB, "weights": 15 * GIB, "workspace": 1 * GIB}
    return GpuMemory(**defaults | facts)


def test_the_pool_gets_what_weights_and_workspace_leave_of_the_share() -> None:
    num_blocks = memory.num_blocks_on_gpu(config(gpu_memory_utilization=0.5), NEED, gpu())
    pool = 40 * GIB - 15 * GIB - 1 * GIB - memory.OUTSIDE_ALLOCATOR_BYTES
    assert num_blocks == pool // NEED.block_bytes


def test_ranks_leave_room_for_what_connects_them() -> None:
    options = {"gpu_memory_utilization": 0.5}
    alone = memory.num_blocks_on_gpu(config(**options), NEED, gpu())
    shared = memory.num_blocks_on_gpu(config(tensor_parallel_size=2, **options), NEED, gpu())
    assert alone - shared == memory.OUTSIDE_OF_RANKS_BYTES // NEED.block_bytes


def test_two_engines_on_one_gpu_count_only_their_own_weights() -> None:
    """The first engine's memory is not free any more, but it is not part of this one's share."""
    alone = memory.num_blocks_on_gpu(config(gpu_memory_utilization=0.45), NEED, gpu())
    second = memory.num_blocks_on_gpu(config(gpu_memory_utilization=0.45), NEED, gpu(free=29 * GIB))
    assert second == alone


def test_a_share_that_others_already_use_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"only 10\.00 GiB of the GPU's 80\.00 GiB are free"):
        memory.num_blocks_on_gpu(config(), NEED, gpu(free=10 * GIB))


def test_a_model_that_does_not_fit_says_the_arithmetic_and_what_to_change() -> None:
    need = KVNeed(block_bytes=16 * 131_072, block_size=16, max_model_len=131_072, max_num_seqs=8)
    with pytest.raises(ConfigError) as caught:
        memory.num_blocks_on_gpu(config(gpu_memory_utilization=0.3), need, gpu())
    assert str(caught.value) == (
        "Weights 15.00 GiB + workspace 1.69 GiB + KV of one sequence of 131072 tokens 16.00 GiB "
        "= 32.69 GiB, but --gpu-memory-utilization 0.3 of 80.00 GiB is 24.00 GiB: lower "
        "--max-model-len to at most 59904, or raise --gpu-memory-utilization to at least 0.41."
    )
    fits = KVNeed(block_bytes=16 * 131_072, block_size=16, max_model_len=59_904, max_num_seqs=8)
    memory.num_blocks_on_gpu(config(gpu_memory_utilization=0.3), fits, gpu())
    memory.num_blocks_on_gpu(config(gpu_memory_utilization=0.41), need, gpu())


def test_a_model_beyond_the_gpu_is_told_so() -> None:
    with pytest.raises(ConfigError, match="use a GPU with more memory or a smaller model"):
        memory.num_blocks_on_gpu(config(), NEED, gpu(weights=90 * GIB))


def test_a_given_pool_is_taken_exactly() -> None:
    given = config(kv_cache_memory_bytes=2 * GIB)
    assert memory.num_blocks_on_gpu(given, NEED, gpu()) == 2 * GIB // NEED.block_bytes
    assert memory.num_blocks_on_cpu(given, NEED, available_bytes=3 * GIB) == 1024


def test_a_given_pool_too_small_for_one_sequence_is_refused() -> None:
    with pytest.raises(ConfigError, match="lower --max-model-len to at most 2048, or raise it"):
        memory.num_blocks_on_cpu(
            config(kv_cache_memory_bytes=GIB // 4), NEED, available_bytes=8 * GIB
        )


def test_a_small_model_on_a_cpu_gets_only_what_all_sequences_need() -> None:
    need = KVNeed(block_bytes=16 * 1024, block_size=16, max_model_len=1024, max_num_seqs=4)
    assert memory.num_blocks_on_cpu(config(), need, available_bytes=8 * GIB) == 4 * 64


def test_a_cpu_pool_is_256_mib_unless_one_sequence_needs_more() -> None:
    small = KVNeed(block_bytes=64 * 1024, block_size=16, max_model_len=2048, max_num_seqs=256)
    assert memory.num_blocks_on_cpu(config(), small, available_bytes=8 * GIB) == 4096
    assert memory.num_blocks_on_cpu(config(), NEED, available_bytes=8 * GIB) == 512


def test_a_sequence_beyond_main_memory_is_refused_with_a_length_that_fits() -> None:
    with pytest.raises(ConfigError, match="Lower --max-model-len to at most 4096"):
        memory.num_blocks_on_cpu(config(), NEED, available_bytes=GIB)


def test_a_pool_beyond_what_is_free_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"asks for 2\.00 GiB of KV, but this machine has 1\.00"):
        memory.num_blocks_on_cpu(config(kv_cache_memory_bytes=2 * GIB), NEED, available_bytes=GIB)
    with pytest.raises(ConfigError, match=r"num-gpu-blocks-override asks for .* the GPU has"):
        memory.num_blocks_on_gpu(config(num_gpu_blocks_override=1 << 20), NEED, gpu())


def test_a_small_machine_gets_a_pool_of_half_of_what_is_free() -> None:
    need = KVNeed(block_bytes=64 * 1024, block_size=16, max_model_len=2048, max_num_seqs=256)
    assert memory.num_blocks_on_cpu(config(), need, available_bytes=128 << 20) == 1024


def test_an_override_is_the_number_of_blocks() -> None:
    override = config(num_gpu_blocks_override=7)
    assert memory.num_blocks_on_cpu(override, NEED, available_bytes=GIB) == 7
    assert memory.num_blocks_on_gpu(override, NEED, gpu()) == 7


def test_weights_beyond_memory_are_refused_before_loading() -> None:
    with pytest.raises(ConfigError, match=r"weights take 15\.00 GiB, but the GPU has 8\.00 GiB"):
        memory.check_weights_fit(15 * GIB, 8 * GIB, "the GPU")


def test_main_memory_that_can_be_had_is_positive() -> None:
    assert memory.available_main_memory() > 0


# ---- host memory ------------------------------------------------------------------------

LAYOUT = KVLayout(num_layers=32, block_size=16, num_kv_heads=8, head_size=128, dtype=torch.bfloat16)


def test_host_memory_keeps_whole_blocks_over_all_layers() -> None:
    asked = config(kv_offloading_size=0.01)
    assert memory.num_host_blocks(asked, LAYOUT) == int(0.01 * GIB) // (2 << 20)
    assert memory.num_host_blocks(config(), LAYOUT) == 0


@pytest.mark.parametrize(
    ("size", "problem"), [(1e6, "this machine has"), (0.001, "one KV block takes 2.0 MiB")]
)
def test_host_memory_that_is_too_much_or_too_little_is_refused(size: float, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        memory.num_host_blocks(config(kv_offloading_size=size), LAYOUT)
    assert caught.value.param == "kv_offloading_size"


def test_host_memory_needs_blocks_that_are_found_by_content() -> None:
    with pytest.raises(ConfigError, match="prefix caching"):
        config(kv_offloading_size=1.0, enable_prefix_caching=False)
    with pytest.raises(ConfigError, match=r"must be in \[0, "):
        config(kv_offloading_size=-1.0)
