"""Pools whose models are cut over other numbers of ranks exchange KV, token for token."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch

from cluster.request import SamplingParams
from tests.e2e.split_pair import make_request, split_pair

if TYPE_CHECKING:
    from collections.abc import Iterator

    from engine.engine import Engine
    from tests.checkpoints import Expected, OpenEngine

NUM_TOKENS = 24
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, seed=0, temperature=0.0)


GPU = {"device": "cuda:0", "num_gpu_blocks_override": 400}
RANKS = [(2, 1), (1, 2), (2, 2)]


@contextmanager
def engine_of(
    open_engine: OpenEngine, family: str, num_ranks: int, **options: Any
) -> Iterator[Engine]:
    engine = open_engine(
        family, tensor_parallel_size=num_ranks, max_num_batched_tokens=64, **options
    )
    try:
        yield engine
    finally:
        engine.close()


def check_tokens(prefill: Engine, decode: Engine, reference: list[dict[str, list[int]]]) -> None:
    """All prompts through both nodes, twice: then with prefix hits on both."""

    async def main() -> None:
        async with split_pair(prefill, decode) as pair:
            for _ in range(2):
                requests = [make_request(case["prompt"], GREEDY) for case in reference]
                answers = await pair.split(requests)
                assert [a.token_ids for a in answers] == [case["tokens"] for case in reference]
                assert all(answer.was_handed_off for answer in answers)
                await pair.check_nothing_held()

    asyncio.run(main())


@pytest.mark.parametrize(("on_prefill", "on_decode"), RANKS)
@pytest.mark.parametrize("family", ["llama3", "qwen3"])
def test_tokens_do_not_depend_on_the_ranks_of_either_node(
    family: str,
    on_prefill: int,
    on_decode: int,
    expected: Expected,
    open_engine: OpenEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Layers are sent while later ones are computed, which the other rank may still do.
    monkeypatch.setattr("prefill_node.node.CPU_GROUP_BYTES", 1)
    with (
        engine_of(open_engine, family, on_prefill) as prefill,
        engine_of(open_engine, family, on_decode) as decode,
    ):
        check_tokens(prefill, decode, expected[family])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("on_prefill", "on_decode"), RANKS)
def test_tokens_on_gpus_do_not_depend_on_the_ranks_of_either_node(
    on_prefill: int,
    on_decode: int,
    expected: Expected,
    open_engine: OpenEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both nodes begin on the first GPU; KV of the second is packed and placed over NVLink."""
    monkeypatch.setattr("prefill_node.node.GPU_GROUP_BYTES", 1)
    with (
        engine_of(open_engine, "llama3", on_prefill, **GPU) as prefill,
        engine_of(open_engine, "llama3", on_decode, **GPU) as decode,
    ):
        check_tokens(prefill, decode, expected["llama3"])
