"""Which steps are run before serving."""

from __future__ import annotations

import torch

from engine.limits import EngineLimits
from engine.warm_up import warm_up_sizes


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
