"""Bugs that others had when the same place had another owner.

Each test names the reports it comes from; see `test_bug_catalogue.py`.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from cluster.errors import TransferFailed
from cluster.node import new_incarnation
from kv_transfer.protocol import FrameLimits
from kv_transfer.receiving.intake_instructions import (
    Dropping,
    Free,
    SendCommitted,
    SendRefused,
    SendTicket,
)
from kv_transfer.staging import Staging
from tests.kv_transfer.catalogue_worlds import (
    with_peer,
)
from tests.kv_transfer.receiving.intake_world import (
    SESSION,
    make_header,
    make_sequence,
    of_kind,
    reserved_world,
)
from tests.kv_twins import COMPATIBLE, UNIT_BYTES, DecodeSide

if TYPE_CHECKING:
    from tests.kv_faults import HandDriven


@pytest.mark.parametrize("field", ["incarnation", "epoch", "nonce"])
def test_a_frame_of_an_earlier_owner_is_not_taken(field: str) -> None:
    """mc#850: the same address, used again (ABA)."""
    world = reserved_world()
    ticket = world.side.ticket
    assert ticket is not None
    stale = make_header(ticket, 0, (0,), **{field: getattr(ticket, field) ^ 1})
    fate, _ = world.intake.frame_arrived(SESSION, stale, 0.0)
    assert isinstance(fate, Dropping)
    assert not fate.is_counted


def test_a_commit_of_an_earlier_owner_starts_nothing() -> None:
    """mc#4239: another path to the same memory did not look."""
    world = reserved_world()
    side = world.side
    world.post(side)
    world.arrive(side)
    world.end(side, 0)
    assert side.ticket is not None
    side.ticket = replace(side.ticket, epoch=side.ticket.epoch - 2)
    world.commit(side)
    [answer] = of_kind(world, SendCommitted)
    assert answer.error is not None
    assert side.num_starts == 0


def test_an_acknowledgement_of_an_earlier_abort_frees_nothing() -> None:
    """mc#4153: nor did a third."""
    world = reserved_world()
    side = world.side
    world.cancel(side)
    assert side.abort_epoch is not None
    side.abort_epoch -= 2
    world.ack(side)
    assert not of_kind(world, Free)


def test_a_ticket_is_for_one_transfer_and_a_transfer_for_one_ticket() -> None:
    """mc#850: an id that is used twice names two owners."""
    world = reserved_world()
    first = world.side.ticket
    world.cancel(world.side)
    world.ack(world.side)
    [again] = world.intake.reserve_asked(SESSION, make_sequence(), world.now)
    assert isinstance(again, SendRefused)
    assert again.error.reason == "ticket_invalid"
    world.intake.reserve_asked(SESSION, make_sequence(transfer=2, attempt=2), world.now)
    [second] = world.intake.reserved(bytes([2]) * 16, (0,), 0, world.now)
    assert isinstance(second, SendTicket)
    assert first is not None
    assert first.nonce != second.ticket.nonce
    assert first.epoch != second.ticket.epoch


def test_who_kept_a_staging_slot_too_long_is_told_from_its_next_owner() -> None:
    """mc#850, for slots."""

    async def scenario() -> None:
        limits = FrameLimits(num_layers=1, unit_bytes=UNIT_BYTES, slot_bytes=4096)
        device = torch.device("cpu")
        staging = Staging(slot_bytes=4096, num_slots=1, limits=limits, device=device)
        kept = await staging.acquire("first")
        staging.release(kept)
        taken = await staging.acquire("second")
        assert taken.payload.data_ptr() == kept.payload.data_ptr()
        assert staging.owns(taken)
        assert not staging.owns(kept)
        with pytest.raises(KeyError):
            staging.release(kept)
        assert staging.num_free == 0

    asyncio.run(scenario())


def test_a_process_that_was_replaced_does_not_end_its_successors_session() -> None:
    """vllm#49238: handles of an earlier process of the same address."""

    async def main(peer: HandDriven, decode: DecodeSide) -> None:
        stale = decode.node_id
        current = replace(stale, incarnation=new_incarnation())
        ours = COMPATIBLE
        decode.receiver.open_session(stale, ours)
        session = decode.receiver.open_session(current, ours)
        for _ in range(2):
            with pytest.raises(TransferFailed) as refused:
                decode.receiver.open_session(stale, ours)
            assert refused.value.reason == "prefill_replaced"
        assert session in list(decode.receiver._sessions)

    with_peer(main)
