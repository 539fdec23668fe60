"""Transfers whose connection was cut, but what was posted on it does not end."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from cluster.errors import InternalError
from cluster.request import KVLoadFailurePolicy
from kv_transfer.receiving.intake_instructions import ReportFailed, ReportStranded, SendRefused
from tests.kv_transfer.receiving.intake_world import (
    SESSION,
    IntakeWorld,
    make_intake,
    make_sequence,
)

if TYPE_CHECKING:
    from cluster.errors import ServingError


def test_a_node_that_goes_on_with_a_sequence_hears_that_its_blocks_never_come_back() -> None:
    """Its gateway was told that it recomputes, and waits."""
    intake = make_intake()
    intake.session_opened(1)
    recompute = KVLoadFailurePolicy.RECOMPUTE
    sequences = [
        replace(make_sequence(name, transfer=number), kv_load_failure_policy=recompute)
        for number, name in enumerate(("taken over", "given up"), 1)
    ]
    for sequence in sequences:
        intake.reserve_asked(1, sequence, 0.0)
        intake.reserved(sequence.transfer_id, (5, 6), 0, 0.0)
    intake.session_lost(1, 1.0)
    intake.taken_over(sequences[0].transfer_id)
    [stranded] = intake.revocation_failed(1, 2.0)
    assert isinstance(stranded, ReportStranded)
    assert stranded.sequence is sequences[0]
    assert stranded.error.reason == "link_lost"
    assert intake.num_stuck_blocks(1) == 4


def test_who_waits_for_blocks_that_never_come_back_is_refused() -> None:
    """An older attempt's connection could not be revoked: its blocks are kept for good."""
    intake = make_intake()
    for session_id in (1, 2):
        intake.session_opened(session_id)
    older, newer, newest = (make_sequence(transfer=n, attempt=n) for n in (1, 2, 3))
    intake.reserve_asked(1, older, 0.0)
    intake.reserved(older.transfer_id, (5, 6), 0, 0.0)
    intake.session_lost(1, 1.0)
    assert intake.reserve_asked(2, newer, 1.0) == []
    refused = intake.revocation_failed(1, 2.0)
    assert [type(each) for each in refused] == [ReportFailed, SendRefused]
    assert intake.transfers.num_active == 0
    [at_once] = intake.reserve_asked(2, newest, 3.0)
    assert isinstance(at_once, SendRefused)
    assert intake.num_stuck_blocks(1) == 2


@pytest.mark.parametrize("error", [None, InternalError("It could not.")], ids=["well", "badly"])
def test_a_sequence_on_its_way_to_the_engine_is_waited_for_whatever_its_link_still_touches(
    error: ServingError | None,
) -> None:
    """All of its frames have ended. A node that is told to go must not call itself idle before it
    runs, or its blocks are free."""
    world = IntakeWorld()
    world.answer(world.side)
    world.post(world.side)
    world.arrive(world.side)
    world.end(world.side, 0)
    world.commit(world.side)
    world.intake.session_lost(SESSION, 1.0)
    assert world.intake.revocation_failed(SESSION, 2.0) == []
    assert world.intake.num_stuck_blocks(SESSION) == 0
    assert world.intake.transfers.num_active == 1
    world.started(world.side, error)
    assert world.intake.transfers.num_active == 0
    assert not world.side.holds_blocks
