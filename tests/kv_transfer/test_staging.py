"""Staging slots: one owner at a time, fair between peers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from cluster.errors import ConfigError
from kv_transfer.config import KVTransferConfig
from kv_transfer.protocol import FrameLimits
from kv_transfer.staging import Staging


def make_staging(
    num_slots: int = 4, slot_bytes: int = 256, max_share: int | None = None
) -> Staging:
    limits = FrameLimits(num_layers=2, unit_bytes=64, slot_bytes=slot_bytes)
    return Staging(
        slot_bytes=slot_bytes,
        num_slots=num_slots,
        limits=limits,
        device=torch.device("cpu"),
        max_share=max_share,
    )


def test_a_slot_too_small_for_one_unit_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="at least 64"):
        make_staging(slot_bytes=63)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_slots_that_do_not_fit_are_a_configuration_error(
    monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    def no_memory(*_: object, **__: object) -> torch.Tensor:
        raise error

    monkeypatch.setattr(torch, "empty", no_memory)
    with pytest.raises(ConfigError, match=r"--num-staging-slots 4 .* beside the engine") as refused:
        make_staging()
    assert "\n" not in refused.value.message


@pytest.mark.parametrize(
    "option", [{"num_staging_slots": 1 << 63}, {"staging_slot_bytes": 1 << 63}]
)
def test_slots_that_no_machine_has_room_for_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be in") as refused:
        KVTransferConfig(**option)
    assert refused.value.param in option


def test_slots_are_distinct_memory_and_come_back() -> None:
    async def scenario() -> None:
        staging = make_staging()
        slots = [await staging.acquire(owner) for owner in "abcd"]
        assert len({slot.payload.data_ptr() for slot in slots}) == 4
        for slot in slots:
            staging.release(slot)
        assert staging.num_free == 4
        staging.check_integrity()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("num_slots", "max_share", "share"), [(4, None, 3), (4, 4, 3), (10, 2, 2), (2, None, 1)]
)
def test_a_peer_that_hangs_leaves_slots_to_the_others(
    num_slots: int, max_share: int | None, share: int
) -> None:
    async def scenario() -> None:
        staging = make_staging(num_slots, max_share=max_share)
        for _ in range(share):
            await staging.acquire("hung")
        one_more = asyncio.ensure_future(staging.acquire("hung"))
        await asyncio.sleep(0)
        assert not one_more.done()
        staging.release(await staging.acquire("other"))
        one_more.cancel()
        await asyncio.wait([one_more])
        staging.check_integrity()

    asyncio.run(scenario())


def test_who_asked_first_is_served_first() -> None:
    async def scenario() -> None:
        staging = make_staging(num_slots=2)
        first, second = await staging.acquire("a"), await staging.acquire("b")
        order: list[str] = []

        async def ask(owner: str) -> None:
            await staging.acquire(owner)
            order.append(owner)

        waiting = [asyncio.ensure_future(ask(owner)) for owner in "cd"]
        await asyncio.sleep(0)
        staging.release(first)
        staging.release(second)
        await asyncio.wait(waiting)
        assert order == ["c", "d"]

    asyncio.run(scenario())


def test_a_cancelled_wait_loses_no_slot() -> None:
    async def scenario() -> None:
        staging = make_staging(num_slots=2)
        held = await staging.acquire("a"), await staging.acquire("b")
        waiting = asyncio.ensure_future(staging.acquire("c"))
        await asyncio.sleep(0)
        staging.release(held[0])  # given to the waiter in the same turn that cancels it
        waiting.cancel()
        await asyncio.wait([waiting])
        staging.release(held[1])
        assert staging.num_free == 2
        staging.check_integrity()

    asyncio.run(scenario())
