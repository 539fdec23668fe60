"""A gateway says that it has lost the sender of a transfer: what the intake makes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kv_transfer.config import KVTransferConfig
from kv_transfer.receiving.endings import DOUBT_SECONDS
from kv_transfer.receiving.intake_instructions import (
    Free,
    ReportFailed,
    Revoke,
    SendAbort,
    SendRefused,
    Start,
    StopAsking,
)
from tests.kv_transfer.receiving.intake_world import (
    DRAIN_SECONDS,
    IntakeWorld,
    of_kind,
    reserved_world,
)

if TYPE_CHECKING:
    from collections.abc import Callable


def reasons(world: IntakeWorld) -> list[str | None]:
    return [failed.error.reason for failed in of_kind(world, ReportFailed)]


def test_a_transfer_that_stands_still_ends_at_once() -> None:
    world = reserved_world()
    world.now += DOUBT_SECONDS
    world.doubt(world.side)
    assert reasons(world) == ["prefill_lost"]
    assert len(of_kind(world, SendAbort)) == 1, "a sender that lives after all must stop"


def test_a_transfer_that_moves_goes_on_and_starts() -> None:
    world = reserved_world()
    side = world.side
    world.post(side)
    world.doubt(side)
    for step in (world.arrive, lambda side: world.end(side, 0), world.commit):
        world.tick(DOUBT_SECONDS * 0.6)
        step(side)
    assert len(of_kind(world, Start)) == 1
    world.started(side)
    world.tick(60.0)
    assert reasons(world) == []


def test_one_that_moved_at_first_ends_when_it_stands_still() -> None:
    world = reserved_world()
    world.doubt(world.side)
    assert reasons(world) == []
    world.tick(DOUBT_SECONDS)
    assert reasons(world) == ["prefill_lost"]


def test_one_whose_sender_nobody_doubts_may_stand_still() -> None:
    world = reserved_world()
    world.tick(DOUBT_SECONDS)
    assert reasons(world) == []


@pytest.mark.parametrize("drain_seconds", [0.5, 1.0, 60.0])
def test_what_waits_here_for_its_turn_to_be_read_does_not_stand_still(drain_seconds: float) -> None:
    config = KVTransferConfig(drain_seconds=drain_seconds)
    assert config.patience_seconds <= DOUBT_SECONDS / 2


def test_one_that_waits_for_room_asks_no_more() -> None:
    world = IntakeWorld()
    world.now += DOUBT_SECONDS
    world.doubt(world.side)
    assert len(of_kind(world, StopAsking)) == len(of_kind(world, SendRefused)) == 1


def doubt_first(world: IntakeWorld) -> None:
    world.now += DOUBT_SECONDS
    world.doubt(world.side)


def cancel_first(world: IntakeWorld) -> None:
    world.cancel(world.side)
    world.doubt(world.side)


@pytest.mark.parametrize("begin", [doubt_first, cancel_first])
def test_its_connection_is_cut_sooner_than_that_of_a_sender_that_lives(
    begin: Callable[[IntakeWorld], None],
) -> None:
    assert DOUBT_SECONDS < DRAIN_SECONDS
    world = reserved_world()
    world.post(world.side)
    begin(world)
    world.tick(DOUBT_SECONDS / 2)
    assert not of_kind(world, Revoke)
    world.tick(DOUBT_SECONDS / 2)
    assert len(of_kind(world, Revoke)) == 1
    assert not of_kind(world, Free), "the frame that was posted may still land"
    world.cut()
    assert len(of_kind(world, Free)) == 1


def test_a_sender_that_lives_after_all_answers_and_keeps_its_connection() -> None:
    world = reserved_world()
    doubt_first(world)
    world.ack(world.side)
    assert len(of_kind(world, Free)) == 1
    world.tick(DRAIN_SECONDS)
    assert not of_kind(world, Revoke)


def test_doubts_about_what_runs_or_was_never_heard_of_change_nothing() -> None:
    world = reserved_world()
    side = world.side
    world.post(side)
    world.arrive(side)
    world.end(side, 0)
    world.commit(side)
    world.now += DOUBT_SECONDS
    world.doubt(side)
    world.started(side)
    world.doubt(side)
    assert world.intake.sender_doubted("nobody", world.now) == []
    assert reasons(world) == []
