"""Pools whose models are cut over other numbers of ranks exchange KV, token for token."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import pytest

from cluster.request import SamplingParams
from tests.e2e.split_pair import make_request, split_pair

if TYPE_CHECKING:
    from collections.abc import Iterator

    from engine.engine import Engine
    from tests.checkpoints import Expected, OpenEngine

NUM_TOKENS = 24
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, seed=0, temperature=0.0)


@contextmanager
def engine_of(open_engine: OpenEngine, family: str, num_ranks: int) -> Iterator[Engine]:
    engine = open_engine(family, tensor_parallel_size=num_ranks, max_num_batched_tokens=64)
    try:
        yield engine
    finally:
        engine.close()


@pytest.mark.parametrize(("on_prefill", "on_decode"), [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("family", ["llama3", "qwen3"])
def test_tokens_do_not_depend_on_the_ranks_of_either_node(
    family: str,
    on_prefill: int,
    on_decode: int,
    expected: Expected,
    open_engine: OpenEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference = expected[family]
    tokens = [case["tokens"] for case in reference]

    async def main(prefill: Engine, decode: Engine) -> None:
        async with split_pair(prefill, decode) as pair:
            for _ in range(2):  # the second time with prefix hits on both nodes
                requests = [make_request(case["prompt"], GREEDY) for case in reference]
                answers = await pair.split(requests)
                assert [answer.token_ids for answer in answers] == tokens
                assert all(answer.was_handed_off for answer in answers)
                await pair.check_nothing_held()

    # Layers are sent while later ones are computed, which the other rank may still do.
    monkeypatch.setattr("prefill_node.node.CPU_GROUP_BYTES", 1)
    with ExitStack() as stack:
        prefill, decode = (
            stack.enter_context(engine_of(open_engine, family, num_ranks))
            for num_ranks in (on_prefill, on_decode)
        )
        asyncio.run(main(prefill, decode))
