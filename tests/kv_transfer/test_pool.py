"""Blocks to slots and back, with digests."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from kv_transfer.pool import TransferPool
from tests.kv_twins import NUM_LAYERS, UNIT_BYTES, make_pool


def test_gathered_units_lie_layer_by_layer_in_the_slot() -> None:
    async def scenario() -> None:
        blocks = make_pool(1)
        pool = TransferPool(blocks)
        slot = torch.zeros(4096, dtype=torch.uint8)
        await pool.end(
            pool.begin_gather(slot, layer_start=1, num_layers=2, block_ids=(7, 3), after=None)
        )
        packed = slot[: 4 * UNIT_BYTES].view(2, 2, UNIT_BYTES)
        assert torch.equal(packed, blocks[1:3][:, [7, 3]])
        pool.close()

    asyncio.run(scenario())


def test_scattering_what_was_gathered_copies_the_blocks_and_gives_the_same_digests() -> None:
    async def scenario() -> None:
        source, target = make_pool(1), make_pool(2)
        one, other = TransferPool(source), TransferPool(target)
        slot = torch.zeros(4096, dtype=torch.uint8)
        whole: dict[str, Any] = {"layer_start": 0, "num_layers": NUM_LAYERS}
        digests = await one.end(one.begin_gather(slot, **whole, block_ids=(5, 9), after=None))
        assert await other.end(
            other.begin_scatter(
                slot,
                **whole,
                block_ids=(30, 2),
                accepts=lambda found: np.array_equal(found, digests),
            )
        )
        assert torch.equal(target[:, [30, 2]], source[:, [5, 9]])
        one.close()
        other.close()

    asyncio.run(scenario())


def test_a_slot_that_is_not_accepted_leaves_the_blocks_alone() -> None:
    async def scenario() -> None:
        target = make_pool(2)
        before = target.clone()
        pool = TransferPool(target)
        slot = torch.zeros(4096, dtype=torch.uint8)
        whole: dict[str, Any] = {"layer_start": 0, "num_layers": NUM_LAYERS}
        assert not await pool.end(
            pool.begin_scatter(
                slot,
                **whole,
                block_ids=(1,),
                accepts=lambda _: False,
            )
        )
        assert torch.equal(target, before)
        pool.close()

    asyncio.run(scenario())


def test_pools_cut_by_heads_exchange_the_bytes_of_whole_ones() -> None:
    """Two ranks to one, one to two: the slot looks the same, and so do its digests."""

    async def scenario() -> None:
        whole = make_pool(1)
        keys, values = whole.chunk(2, dim=2)
        parts = [
            torch.cat((keys.chunk(2, dim=2)[rank], values.chunk(2, dim=2)[rank]), dim=2)
            for rank in range(2)
        ]
        one, two = TransferPool(whole), TransferPool(*parts)
        assert two.unit_bytes == one.unit_bytes
        slots = [torch.zeros(4096, dtype=torch.uint8) for _ in range(2)]
        layers: dict[str, Any] = {"layer_start": 1, "num_layers": 2}
        digests = [
            await pool.end(pool.begin_gather(slot, **layers, block_ids=(7, 3), after=None))
            for pool, slot in zip((one, two), slots, strict=True)
        ]
        assert torch.equal(*slots)
        assert np.array_equal(digests[0], digests[1])
        for pool in (one, two):
            assert await pool.end(
                pool.begin_scatter(slots[0], **layers, block_ids=(2, 9), accepts=lambda _: True)
            )
            pool.close()
        assert torch.equal(whole[1:3][:, [2, 9]], whole[1:3][:, [7, 3]])
        for part in parts:
            assert torch.equal(part[1:3][:, [2, 9]], part[1:3][:, [7, 3]])

    asyncio.run(scenario())


@pytest.mark.gpu
def test_moves_on_a_gpu_are_those_in_host_memory() -> None:
    """Many at once, in other orders of the same blocks, and behind what is still computed."""

    async def scenario() -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        blocks = make_pool(1)
        here, there = TransferPool(blocks), TransferPool(torch.zeros_like(blocks, device=device))
        ids = [tuple(torch.randperm(32)[:7].tolist()) for _ in range(12)]
        layers: dict[str, Any] = {"layer_start": 1, "num_layers": 2}
        slots = [torch.zeros(4096, dtype=torch.uint8) for _ in ids]
        digests = [
            await here.begin_gather(slot, **layers, block_ids=each, after=None)
            for slot, each in zip(slots, ids, strict=True)
        ]
        arrived = [slot.to(device) for slot in slots]
        scattering = [
            there.begin_scatter(
                slot, **layers, block_ids=each,
                accepts=partial(np.array_equal, wanted),
            )
            for slot, each, wanted in zip(arrived, ids, digests, strict=True)
        ]  # fmt: skip
        assert all(await asyncio.gather(*scattering))
        torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        back = [torch.zeros_like(slot) for slot in arrived]
        found = await asyncio.gather(*(
            there.begin_gather(slot, **layers, block_ids=each, after=done)
            for slot, each in zip(back, ids, strict=True)
        ))  # fmt: skip
        assert all(map(np.array_equal, found, digests))
        assert all(
            torch.equal(slot.cpu(), wanted) for slot, wanted in zip(back, slots, strict=True)
        )
        here.close()
        there.close()

    asyncio.run(scenario())


@pytest.mark.gpu
def test_without_digests_whatever_arrives_is_accepted() -> None:
    """For measuring what they cost."""

    async def scenario() -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        source, target = make_pool(1).to(device), make_pool(2).to(device)
        pools = [TransferPool(each, takes_digests=False) for each in (source, target)]
        slot = torch.zeros(4096, dtype=torch.uint8, device=device)
        layers: dict[str, Any] = {"layer_start": 0, "num_layers": NUM_LAYERS}
        gathering = pools[0].begin_gather(slot, **layers, block_ids=(5,), after=None)
        assert not (await gathering).any()
        assert await pools[1].begin_scatter(slot, **layers, block_ids=(3,), accepts=lambda _: False)
        assert torch.equal(target[:, 3], source[:, 5])
        for pool in pools:
            pool.close()

    asyncio.run(scenario())
