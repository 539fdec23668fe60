"""Two ranks on two GPUs: sums over NVLink, captured steps, KV of the other GPU."""

from __future__ import annotations

import asyncio
import json
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kv_transfer.digests import PlaceSeal, digest_seed
from kv_transfer.frame_place import FramePlace
from kv_transfer.pool import TransferPool
from tests.engine.test_cuda import SHAPE, close, decode_log

if TYPE_CHECKING:
    from pathlib import Path

    from engine.engine import Engine
    from tests.engine.conftest import Expected, OpenEngine, RunGreedy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
GPU = {"device": "cuda:0", "num_gpu_blocks_override": 400}


def test_greedy_tokens_of_two_gpus_are_those_of_the_reference(
    expected: Expected, open_engine: OpenEngine, run_greedy: RunGreedy
) -> None:
    """With graphs and without; prompts small enough for the kernel and too large for it."""
    cases = expected["llama3"]
    prompts, tokens = [c["prompt"] for c in cases], [c["tokens"] for c in cases]
    for enforce_eager in (True, False):
        options: dict[str, Any] = GPU | {"enforce_eager": enforce_eager}
        with closing(open_engine("llama3", tensor_parallel_size=2, **options)) as engine:
            for chunk in (32, 1024):
                sequences = run_greedy(engine, prompts, chunk=chunk, num_tokens=24)
                assert [each.output_token_ids for each in sequences] == tokens


def test_logprobs_of_few_rows_on_two_gpus_are_those_of_one(
    tmp_path: Path, open_engine: OpenEngine
) -> None:
    """In bfloat16, where products of few rows sum while they are made: captured and not."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    options: dict[str, Any] = GPU | {
        "model": tmp_path,
        "load_format": "dummy",
        "dtype": "bfloat16",
        "enable_prefix_caching": False,
    }
    whole = open_engine("", **options)
    for enforce_eager in (True, False):
        options["enforce_eager"] = enforce_eager
        with closing(open_engine("", tensor_parallel_size=2, **options)) as engine:
            for num_seqs in (1, 3, 8, 9):
                close(decode_log(engine, num_seqs, 6), decode_log(whole, num_seqs, 6), 0.1)


def test_blocks_move_between_engines_of_one_and_two_gpus(
    expected: Expected, open_engine: OpenEngine, run_greedy: RunGreedy
) -> None:
    prompt = max((case["prompt"] for case in expected["llama3"]), key=len)
    whole = open_engine("llama3", **GPU)
    with closing(open_engine("llama3", tensor_parallel_size=2, **GPU)) as engine:
        for each in (whole, engine):
            run_greedy(each, [prompt], chunk=1024, num_tokens=1)
        one, two = asyncio.run(_gathered(whole)), asyncio.run(_gathered(engine))
        assert one.abs().sum() > 0
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-3)


async def _gathered(engine: Engine) -> torch.Tensor:
    """The KV of the first two blocks, and back into two others, from where it is read again."""
    pool = TransferPool(*engine.kv_pools)
    seal = PlaceSeal(digest_seed(b"", b""), 0, pool.num_layers, (0, 1))
    here, there = FramePlace(seal, (0, 1)), FramePlace(seal, (300, 200))
    units_bytes = 2 * pool.num_layers * pool.unit_bytes
    slots = torch.zeros(2, units_bytes + 8 * seal.num_units, dtype=torch.uint8).cuda()
    await pool.end(pool.begin_gather(slots[0], here, after=None))
    assert await pool.end(pool.begin_scatter(slots[0], there))
    await pool.end(pool.begin_gather(slots[1], there, after=None))
    pool.close()
    assert torch.equal(*slots)
    return slots[0][:units_bytes].view(engine.kv_layout.dtype)
