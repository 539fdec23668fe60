"""A hand-off from pool to pool, over the in-process transport and a real control stream."""

from __future__ import annotations

import asyncio

import torch

from tests.kv_twins import make_request, twins, until


def test_every_byte_of_the_prompt_arrives_in_the_blocks_of_the_other_pool() -> None:
    async def scenario() -> None:
        async with twins() as (prefill, decode):
            request = make_request(30)
            prefill.hand_off(decode, request)
            table = [5, 1, 30, 7, 9, 2, 11, 12]
            prefill.compute(request, table)
            prefill.sender.commit(request.sequence_id, 77)
            name = request.sequence_id
            await until(lambda: prefill.owner.of(name) == ["committed", "free"])
            taken = decode.source.owned[name]
            assert torch.equal(decode.pool[:, taken], prefill.pool[:, table])
            assert decode.source.of(name) == ["reserved", "started"]
            assert decode.source.first_tokens[name] == 77

    asyncio.run(scenario())
