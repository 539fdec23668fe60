"""An engine of two ranks, real processes over gloo: its tokens, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch

from cluster.errors import ConfigError
from engine.tensor_parallel.failures import RankLost
from tests.checkpoints import FAMILIES, REPOSITORY
from tests.quantized_checkpoints import Quantize, awq, float8_by_tensor, write_pair

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from engine.engine import Engine
    from tests.engine.conftest import Expected, OpenEngine, RunGreedy

ENOUGH_SECONDS = 20.0


@contextmanager
def two_ranks(open_engine: OpenEngine, family: str, **options: Any) -> Iterator[Engine]:
    engine = open_engine(family, tensor_parallel_size=2, **options)
    try:
        yield engine
    finally:
        engine.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_two_ranks_are_those_of_the_reference(
    family: str, expected: Expected, open_engine: OpenEngine, run_greedy: RunGreedy
) -> None:
    cases = expected[family]
    prompts = [case["prompt"] for case in cases]
    tokens = [case["tokens"] for case in cases]
    with two_ranks(open_engine, family) as engine:
        for chunk in (32, 1024):  # the second time from the prefix cache
            sequences = run_greedy(engine, prompts, chunk=chunk, num_tokens=24)
            assert [each.output_token_ids for each in sequences] == tokens


def test_short_ends_of_prompts_as_rows_give_the_same_tokens(
    expected: Expected,
    open_engine: OpenEngine,
    run_greedy: RunGreedy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cases = expected["llama3"]
    prompts = [case["prompt"] for case in cases]
    with two_ranks(open_engine, "llama3") as engine:
        run_greedy(engine, prompts, chunk=1024, num_tokens=1)
        monkeypatch.setattr(engine._runner, "max_prompt_rows", engine.max_num_seqs)
        for case in cases:
            (sequence,) = run_greedy(engine, [case["prompt"]], chunk=1024, num_tokens=24)
            assert sequence.output_token_ids == case["tokens"]


@pytest.mark.parametrize("layout", ["float8", "awq"])
def test_tokens_of_a_quantised_checkpoint_are_those_of_one_rank(
    layout: str,
    checkpoints: Path,
    tmp_path: Path,
    expected: Expected,
    open_engine: OpenEngine,
    run_greedy: RunGreedy,
) -> None:
    layouts: dict[str, tuple[Quantize, dict[str, Any]]] = {
        "float8": (float8_by_tensor, {"quant_method": "fp8"}),
        "awq": (partial(awq, group_size=16), {"quant_method": "awq", "group_size": 16}),
    }
    quantize, config = layouts[layout]
    scales = {
        f"model.layers.0.self_attn.{kind}": torch.tensor([0.5, 2.0])
        for kind in ("k_scale", "v_scale")
    }
    pair = write_pair(checkpoints / "llama3", tmp_path, quantize, config, more=scales)
    folder, prompts = str(pair.quantized), [case["prompt"] for case in expected["llama3"]]
    options = {"kv_cache_dtype": "fp8"} if layout == "float8" else {}
    whole = open_engine(folder, **options)
    alone = run_greedy(whole, prompts, chunk=64, num_tokens=24)
    with two_ranks(open_engine, folder, **options) as engine:
        shared = run_greedy(engine, prompts, chunk=64, num_tokens=24)
        assert engine.weights_fingerprint == whole.weights_fingerprint
        assert engine.kv_layout == whole.kv_layout
    same = [a.output_token_ids == b.output_token_ids for a, b in zip(alone, shared, strict=True)]
    # 8-bit KV may fall on the other side of a step when sums are made in another order.
    assert sum(same) >= (len(same) - 2 if options else len(same))


def test_each_rank_has_its_part_of_every_kv_head(open_engine: OpenEngine) -> None:
    whole = open_engine("llama3")
    with two_ranks(open_engine, "llama3", num_gpu_blocks_override=70) as engine:
        assert engine.kv_layout == whole.kv_layout
        assert engine.weights_fingerprint == whole.weights_fingerprint
        assert len(engine.kv_pools) == 2
        for pool in engine.kv_pools:
            assert pool.shape == (engine.kv_layout.num_layers, 70, engine.kv_layout.unit_bytes // 2)


def test_kv_that_both_ranks_wrote_is_seen_by_the_first(
    expected: Expected, open_engine: OpenEngine, run_greedy: RunGreedy
) -> None:
    prompt = next(case["prompt"] for case in expected["llama3"] if len(case["prompt"]) >= 32)
    whole = open_engine("llama3")
    with two_ranks(open_engine, "llama3") as engine:
        for each in (whole, engine):
            run_greedy(each, [prompt], chunk=16, num_tokens=1)
        layout = engine.kv_layout
        shape = (layout.num_layers, -1, 2, layout.num_kv_heads, layout.block_size, layout.head_size)
        (one,) = whole.kv_pools
        parts = [
            pool.view(layout.dtype).view(*shape[:3], layout.num_kv_heads // 2, *shape[4:])
            for pool in engine.kv_pools
        ]
        whole_kv = one.view(layout.dtype).view(shape)
        for head in range(layout.num_kv_heads):
            part, place = divmod(head, layout.num_kv_heads // 2)
            ours = parts[part][:, :2, :, place]
            assert ours.abs().sum() > 0
            assert (ours - whole_kv[:, :2, :, head]).abs().max() < 1e-4


@pytest.mark.parametrize("is_idle", [True, False])
def test_a_killed_rank_ends_the_engine(
    is_idle: bool, expected: Expected, open_engine: OpenEngine, run_greedy: RunGreedy
) -> None:
    prompt = expected["llama3"][0]["prompt"]
    with two_ranks(open_engine, "llama3") as engine:
        lost: list[BaseException] = []
        heard = threading.Event()

        def on_lost(error: BaseException) -> None:
            lost.append(error)
            heard.set()

        engine.watch(on_lost)
        (pid,) = engine.worker_pids
        os.kill(pid, signal.SIGKILL)
        if is_idle:
            assert heard.wait(ENOUGH_SECONDS)
            assert [type(error) for error in lost] == [RankLost]
        with pytest.raises(RankLost):
            run_greedy(engine, [prompt], chunk=32, num_tokens=4)


def test_no_worker_outlives_a_killed_first_rank(checkpoints: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path;"
        "from cluster.startup import StartupReport; from engine.config import EngineConfig;"
        "from engine.engine import Engine;"
        "engine = Engine.create(EngineConfig(model=Path(sys.argv[1]), device='cpu',"
        "dtype='float32', tensor_parallel_size=2, num_threads=1),"
        "progress=StartupReport(sink=lambda fact: None));"
        "os.write(1, b'started'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    # The worker inherits this output: it ends when the last of them has ended.
    done = subprocess.run(
        [sys.executable, "-c", program, str(checkpoints / "llama3")],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        timeout=120,
        check=False,
    )
    assert done.stdout == b"started"
    assert done.returncode == -signal.SIGKILL


def test_a_closed_engine_has_no_workers(open_engine: OpenEngine) -> None:
    with two_ranks(open_engine, "qwen3") as engine:
        (pid,) = engine.worker_pids
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_rank_that_cannot_start_says_why(open_engine: OpenEngine, checkpoints: Path) -> None:
    with pytest.raises(ConfigError, match="3 does not divide the model's 4 attention heads"):
        open_engine("llama3", tensor_parallel_size=3)
