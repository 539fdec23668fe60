"""Blocks to slots and back, with digests."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import torch

from kv_transfer.digests import PlaceSeal, digest_seed
from kv_transfer.frame_place import FramePlace
from kv_transfer.pool import TransferPool
from tests.kv_twins import NUM_LAYERS, UNIT_BYTES, make_pool

SEED = digest_seed(bytes(16), b"tenant")


def place(layer_start: int, num_layers: int, block_ids: tuple[int, ...]) -> FramePlace:
    """The first positions of a prompt, in these blocks."""
    seal = PlaceSeal(SEED, layer_start, num_layers, tuple(range(len(block_ids))))
    return FramePlace(seal, block_ids)


def test_gathered_units_lie_layer_by_layer_in_the_slot() -> None:
    async def scenario() -> None:
        blocks = make_pool(1)
        pool = TransferPool(blocks)
        slot = torch.zeros(4096, dtype=torch.uint8)
        await pool.end(pool.begin_gather(slot, place(1, 2, (7, 3)), after=None))
        packed = slot[: 4 * UNIT_BYTES].view(2, 2, UNIT_BYTES)
        assert torch.equal(packed, blocks[1:3][:, [7, 3]])
        pool.close()

    asyncio.run(scenario())


def test_scattering_what_was_gathered_copies_the_blocks_and_gives_the_same_digests() -> None:
    async def scenario() -> None:
        source, target = make_pool(1), make_pool(2)
        one, other = TransferPool(source), TransferPool(target)
        slot = torch.zeros(4096, dtype=torch.uint8)
        await one.end(one.begin_gather(slot, place(0, NUM_LAYERS, (5, 9)), after=None))
        assert await other.end(other.begin_scatter(slot, place(0, NUM_LAYERS, (30, 2))))
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
        assert not await pool.end(pool.begin_scatter(slot, place(0, NUM_LAYERS, (1,))))
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
        for pool, slot in zip((one, two), slots, strict=True):
            await pool.end(pool.begin_gather(slot, place(1, 2, (7, 3)), after=None))
        assert torch.equal(*slots)
        for pool in (one, two):
            assert await pool.end(pool.begin_scatter(slots[0], place(1, 2, (2, 9))))
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
        slots = [torch.zeros(8192, dtype=torch.uint8) for _ in ids]
        for slot, each in zip(slots, ids, strict=True):
            await here.begin_gather(slot, place(1, 2, each), after=None)
        arrived = [slot.to(device) for slot in slots]
        scattering = [
            there.begin_scatter(slot, place(1, 2, each))
            for slot, each in zip(arrived, ids, strict=True)
        ]
        assert all(await asyncio.gather(*scattering))
        back = [torch.zeros_like(slot) for slot in arrived]  # filled before `done`, not beside it
        torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        await asyncio.gather(*(
            there.begin_gather(slot, place(1, 2, each), after=done)
            for slot, each in zip(back, ids, strict=True)
        ))  # fmt: skip
        assert all(
            torch.equal(slot.cpu(), wanted) for slot, wanted in zip(back, slots, strict=True)
        )
        here.close()
        there.close()

    asyncio.run(scenario())


@pytest.mark.gpu
def test_on_a_gpu_too_what_does_not_fit_its_digests_is_refused() -> None:
    async def scenario() -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        source, target = make_pool(1).to(device), make_pool(2).to(device)
        one, other = TransferPool(source), TransferPool(target)
        slot = torch.zeros(4096, dtype=torch.uint8, device=device)
        await one.begin_gather(slot, place(0, NUM_LAYERS, (5, 9)), after=None)
        num_bytes = 2 * NUM_LAYERS * UNIT_BYTES
        for spoilt in (0, num_bytes // 2, num_bytes - 1, num_bytes, num_bytes + 9):
            slot[spoilt] ^= 4
            torch.cuda.synchronize()
            assert not await other.begin_scatter(slot, place(0, NUM_LAYERS, (30, 2)))
            slot[spoilt] ^= 4
        torch.cuda.synchronize()
        elsewhere = replace(place(0, NUM_LAYERS, (30, 2)).seal, positions=(0, 2))
        assert not await other.begin_scatter(slot, FramePlace(elsewhere, (30, 2)))
        assert await other.begin_scatter(slot, place(0, NUM_LAYERS, (30, 2)))
        one.close()
        other.close()

    asyncio.run(scenario())


@pytest.mark.gpu
def test_without_digests_whatever_arrives_is_accepted() -> None:
    """For measuring what they cost."""

    async def scenario() -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        source, target = make_pool(1).to(device), make_pool(2).to(device)
        pools = [TransferPool(each, takes_digests=False) for each in (source, target)]
        slot = torch.zeros(4096, dtype=torch.uint8, device=device)
        await pools[0].begin_gather(slot, place(0, NUM_LAYERS, (5,)), after=None)
        assert await pools[1].begin_scatter(slot, place(0, NUM_LAYERS, (3,)))
        assert torch.equal(target[:, 3], source[:, 5])
        for pool in pools:
            pool.close()

    asyncio.run(scenario())
