"""The receiving machine: every order of a small set of events, then single rules."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer.receiving.intake_instructions import (
    AskBlocks,
    Dropping,
    Free,
    Landing,
    ReportFailed,
    ReportWithdrawn,
    Revoke,
    SendAbort,
    SendCommitted,
    SendRefused,
    SendRenew,
    SendTicket,
    Start,
    StopAsking,
)
from kv_transfer.transfer import TransferState
from tests.interleavings import explore
from tests.kv_transfer.receiving.intake_world import (
    DRAIN_SECONDS,
    LEASE_SECONDS,
    SESSION,
    IntakeWorld,
    make_header,
    make_sequence,
    reserved_world,
)

HAPPY = ("answer", "post0", "arrive0", "end0", "commit", "started")
AFTERMATH = ("ack", "cut")
TROUBLE = ("withdraw", "fail", "cancel", "expire", "drain", "lose", "bad0", "full", "unstarted")


@pytest.mark.parametrize("trouble", list(itertools.combinations(TROUBLE, 3)), ids="+".join)
def test_every_order_ends_once_with_no_block_held_and_none_freed_under_a_write(
    trouble: tuple[str, ...],
) -> None:
    assert explore(IntakeWorld, (*HAPPY, *AFTERMATH, *trouble)) > 1


@pytest.mark.parametrize("trouble", TROUBLE)
def test_every_order_with_a_sender_that_is_doubted_ends_once(trouble: str) -> None:
    assert explore(IntakeWorld, (*HAPPY, *AFTERMATH, "doubt", "still", trouble)) > 1


@pytest.mark.parametrize("trouble", TROUBLE)
def test_every_order_of_two_frames_and_one_trouble_ends_once(trouble: str) -> None:
    steps = (*HAPPY, *AFTERMATH, "post1", "arrive1", "end1", trouble)
    assert explore(lambda: IntakeWorld(num_frames=2), steps) > 1


@pytest.mark.parametrize("trouble", ["lose", "drain", "cancel"])
def test_every_order_with_a_newer_attempt_frees_the_older_one_first(trouble: str) -> None:
    def make_world() -> IntakeWorld:
        older = make_sequence(transfer=1, attempt=1)
        return IntakeWorld(older, make_sequence(transfer=2, attempt=2))

    steps = ("answer", "full", "answer/1", "post0/1", "arrive0/1", "commit/1", "end0/1")
    assert explore(make_world, (*steps, "started/1", *AFTERMATH, trouble)) > 1


def test_without_trouble_every_order_starts_the_sequence() -> None:
    class Untroubled(IntakeWorld):
        def finish(self) -> None:
            assert self.side.endings == ["started"]
            super().finish()

    steps = (*HAPPY, "post1", "arrive1", "end1")
    assert explore(lambda: Untroubled(num_frames=2), steps) > 5


def last(world: IntakeWorld, kind: type) -> object:
    return [sent for sent in world.sent if isinstance(sent, kind)][-1]


def test_a_ticket_names_only_the_blocks_that_are_not_held_here() -> None:
    world = IntakeWorld()
    world.run(world.intake.reserved(world.side.sequence.transfer_id, (8, 9, 10), 2, 0.0))
    ticket = last(world, SendTicket)
    assert isinstance(ticket, SendTicket)
    assert ticket.ticket.missing_positions == (2,)


def test_a_held_block_is_never_written() -> None:
    world = IntakeWorld()
    world.run(world.intake.reserved(world.side.sequence.transfer_id, (8, 9), 1, 0.0))
    assert world.side.ticket is not None
    fate, instructions = world.intake.frame_arrived(
        SESSION, make_header(world.side.ticket, 0, (0,)), 0.0
    )
    assert isinstance(fate, Dropping)
    assert any(isinstance(instruction, SendAbort) for instruction in instructions)


@pytest.mark.parametrize(
    ("field", "value"), [("incarnation", 1), ("epoch", 99), ("nonce", 1)], ids=lambda v: str(v)
)
def test_a_frame_of_another_ticket_is_dropped_and_changes_nothing(field: str, value: int) -> None:
    world = reserved_world()
    assert world.side.ticket is not None
    header = make_header(world.side.ticket, 0, (0,), **{field: value})
    fate, instructions = world.intake.frame_arrived(SESSION, header, 0.0)
    assert isinstance(fate, Dropping)
    assert not fate.is_counted
    assert instructions == []
    world.post(world.side)
    world.arrive(world.side)
    world.end(world.side, 0)
    world.commit(world.side)
    assert isinstance(last(world, Start), Start)


def test_a_frame_under_another_session_is_dropped() -> None:
    world = reserved_world()
    assert world.side.ticket is not None
    header = make_header(world.side.ticket, 0, (0,))
    fate, _ = world.intake.frame_arrived(SESSION + 1, header, 0.0)
    assert isinstance(fate, Dropping)


def test_a_repeated_frame_is_dropped_and_the_transfer_goes_on() -> None:
    world = reserved_world(num_frames=2)
    ticket = world.side.ticket
    assert ticket is not None
    first = make_header(ticket, 0, (0,))
    assert isinstance(world.intake.frame_arrived(SESSION, first, 0.0)[0], Landing)
    fate, instructions = world.intake.frame_arrived(SESSION, first, 0.0)
    assert isinstance(fate, Dropping)
    assert (fate.is_counted, instructions) == (False, [])
    second = make_header(ticket, 1, (1,))
    assert isinstance(world.intake.frame_arrived(SESSION, second, 0.0)[0], Landing)


def test_a_gap_in_the_frames_aborts() -> None:
    world = reserved_world(num_frames=2)
    assert world.side.ticket is not None
    fate, instructions = world.intake.frame_arrived(
        SESSION, make_header(world.side.ticket, 1, (1,)), 0.0
    )
    assert isinstance(fate, Dropping)
    reasons = [i.error.reason for i in instructions if isinstance(i, ReportFailed)]
    assert reasons == ["frame_lost"]


def test_the_same_block_announced_twice_aborts() -> None:
    world = reserved_world(num_frames=2)
    ticket = world.side.ticket
    assert ticket is not None
    world.intake.frame_arrived(SESSION, make_header(ticket, 0, (0,)), 0.0)
    _, instructions = world.intake.frame_arrived(SESSION, make_header(ticket, 1, (0,)), 0.0)
    reasons = [i.error.reason for i in instructions if isinstance(i, ReportFailed)]
    assert reasons == ["frame_unexpected"]


def test_layers_of_a_block_may_come_in_separate_frames() -> None:
    world = reserved_world()
    side = world.side
    assert side.ticket is not None
    for seq in range(2):
        header = make_header(side.ticket, seq, (0,), layer_start=seq, num_layers=1)
        assert isinstance(world.intake.frame_arrived(SESSION, header, 0.0)[0], Landing)
        world.run(world.intake.frame_ended(side.sequence.transfer_id, None, header, 0.0))
    side.num_posted = side.num_arrived = 2
    world.commit(side)
    assert side.num_starts == 1


def test_committing_before_every_block_was_sent_is_incomplete() -> None:
    world = reserved_world(num_frames=2)
    world.post(world.side)
    world.arrive(world.side)
    world.end(world.side, 0)
    world.commit(world.side)
    failed = last(world, ReportFailed)
    assert isinstance(failed, ReportFailed)
    assert failed.error.reason == "incomplete"
    assert world.side.num_starts == 0


def test_a_repeated_commit_gets_the_stored_result() -> None:
    world = reserved_world()
    side = world.side
    world.post(side)
    world.arrive(side)
    world.end(side, 0)
    world.commit(side)
    world.started(side)
    world.commit(side)
    committed = [sent for sent in world.sent if isinstance(sent, SendCommitted)]
    assert [answer.error for answer in committed] == [None, None]
    assert side.num_starts == 1


def test_a_repeated_commit_of_a_failed_transfer_gets_its_error() -> None:
    world = reserved_world()
    world.post(world.side)
    world.arrive(world.side)
    world.cancel(world.side)
    world.commit(world.side)
    committed = last(world, SendCommitted)
    assert isinstance(committed, SendCommitted)
    assert committed.error is not None
    assert world.side.num_starts == 0


@pytest.mark.parametrize("change", ["nonce", "epoch"])
def test_a_commit_with_a_wrong_ticket_is_refused_and_changes_nothing(change: str) -> None:
    world = reserved_world()
    side = world.side
    assert side.ticket is not None
    ticket = {"nonce": side.ticket.nonce, "epoch": side.ticket.epoch}
    ticket[change] += 1
    instructions = world.intake.commit_asked(
        SESSION, side.sequence.transfer_id, **ticket, num_frames=0, first_token_id=1, now=0.0
    )
    [answer] = instructions
    assert isinstance(answer, SendCommitted)
    assert answer.error is not None
    assert answer.error.reason == "ticket_invalid"
    assert next(iter(world.intake.transfers)).state is TransferState.ACTIVE


def test_blocks_of_an_aborted_transfer_are_quarantined_until_its_frames_are_drained() -> None:
    world = reserved_world(num_frames=2)
    side = world.side
    world.post(side)
    world.post(side)
    world.cancel(side)
    assert world.intake.transfers.num_quarantined_blocks == 2
    world.ack(side)
    world.arrive(side)
    world.arrive(side)
    world.end(side, 0)
    assert side.holds_blocks
    world.end(side, 1)
    assert not side.holds_blocks


def test_an_acknowledgement_of_another_epoch_does_not_free() -> None:
    world = reserved_world()
    side = world.side
    world.cancel(side)
    assert side.abort_epoch is not None
    transfer_id = side.sequence.transfer_id
    world.run(world.intake.abort_acked(SESSION, transfer_id, side.abort_epoch - 1, 0, 0.0))
    assert side.holds_blocks


def test_time_alone_frees_nothing_but_cuts_the_connection() -> None:
    world = reserved_world()
    side = world.side
    world.post(side)
    world.cancel(side)
    world.tick(DRAIN_SECONDS)
    assert isinstance(last(world, Revoke), Revoke)
    world.tick(LEASE_SECONDS)
    assert side.holds_blocks
    world.cut()
    assert not side.holds_blocks


def test_a_lease_that_is_not_renewed_ends_the_transfer() -> None:
    world = reserved_world()
    world.tick(LEASE_SECONDS)
    failed = last(world, ReportFailed)
    assert isinstance(failed, ReportFailed)
    assert failed.error.reason == "lease_expired"


def test_a_renewed_lease_lives_on() -> None:
    world = reserved_world()
    world.tick(LEASE_SECONDS - 1)
    world.intake.renewed(SESSION, world.side.sequence.transfer_id, 20.0, world.now)
    world.tick(15)
    assert world.side.endings == []


def test_a_peer_is_told_to_renew_from_the_moment_it_reserves() -> None:
    world = IntakeWorld()
    world.tick(LEASE_SECONDS / 6)
    renew = last(world, SendRenew)
    assert isinstance(renew, SendRenew)
    assert renew.extend_seconds == pytest.approx(LEASE_SECONDS * 2 / 3)


def test_a_deadline_ends_the_transfer_even_while_it_waits_for_blocks() -> None:
    world = IntakeWorld(make_sequence(deadline=3.0))
    world.tick(3.0)
    assert isinstance(last(world, StopAsking), StopAsking)
    failed = last(world, ReportFailed)
    assert isinstance(failed, ReportFailed)
    assert failed.error.code == "deadline_exceeded"


def test_the_loss_of_one_peer_leaves_the_transfers_of_others_alone() -> None:
    world = reserved_world()
    world.intake.session_opened(SESSION + 1)
    other = make_sequence("other", transfer=9)
    world.intake.reserve_asked(SESSION + 1, other, 0.0)
    world.lose()
    states = {t.sequence.sequence_id: t.state for t in world.intake.transfers}
    assert states == {"s": TransferState.QUARANTINED, "other": TransferState.PENDING}


def test_a_newer_attempt_asks_for_blocks_only_after_the_older_is_freed() -> None:
    world = reserved_world()
    older = world.side
    newer = make_sequence(transfer=2, attempt=2)
    instructions = world.intake.reserve_asked(SESSION, newer, 0.0)
    assert [type(i) for i in instructions] == [ReportWithdrawn, SendAbort]
    world.run([i for i in instructions if isinstance(i, SendAbort)])
    freed = world.intake.abort_acked(
        SESSION, older.sequence.transfer_id, older.abort_epoch or 0, 0, 0.0
    )
    assert [type(i) for i in freed] == [Free, AskBlocks]


def test_a_sequence_that_runs_is_not_reserved_again() -> None:
    world = reserved_world()
    side = world.side
    world.post(side)
    world.arrive(side)
    world.end(side, 0)
    world.commit(side)
    world.started(side)
    [refused] = world.intake.reserve_asked(SESSION, make_sequence(transfer=2, attempt=2), 0.0)
    assert isinstance(refused, SendRefused)
    assert refused.error.reason == "already_started"


def test_a_transfer_id_is_used_once() -> None:
    world = IntakeWorld()
    [refused] = world.intake.reserve_asked(SESSION, make_sequence(), 0.0)
    assert isinstance(refused, SendRefused)


def test_an_ended_transfer_is_remembered_for_two_leases_and_then_forgotten() -> None:
    world = reserved_world()
    world.cancel(world.side)
    world.ack(world.side)
    world.tick(2 * LEASE_SECONDS - 1)
    assert world.intake.transfers.num_remembered == 1
    world.tick(1)
    assert world.intake.transfers.num_remembered == 0


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_random_histories_of_several_transfers_keep_every_rule(data: st.DataObject) -> None:
    sequences = (
        make_sequence("a", transfer=1),
        make_sequence("b", transfer=2, deadline=20.0),
        make_sequence("a", transfer=3, attempt=2),
    )
    world = IntakeWorld(*sequences, num_frames=3)
    for _ in range(data.draw(st.integers(0, 40), label="steps")):
        steps = world.possible()
        steps[data.draw(st.sampled_from(sorted(steps)))]()
    world.finish()
