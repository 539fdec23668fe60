"""The sending machine, in every order of events."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest

from cluster.errors import Cancelled, LeaseExpired, ServingError
from kv_transfer.failures import FailureReason, failure
from kv_transfer.sending.outgoing import FramePlan, Instruction, OutgoingTransfer
from kv_transfer.sending.outgoing_instructions import (
    FreeSources,
    ReportCommitted,
    ReportFailed,
    SendAbort,
    SendAbortAck,
    SendCommit,
)
from kv_transfer.transfer import Ticket, TransferState
from tests.interleavings import explore

if TYPE_CHECKING:
    from collections.abc import Callable

NUM_LAYERS = 2


def make_ticket(*missing: int) -> Ticket:
    return Ticket(
        transfer_id=bytes(16),
        incarnation=1,
        epoch=2,
        nonce=3,
        expires_in_seconds=30.0,
        missing_positions=missing,
    )


def ship_all(machine: OutgoingTransfer, *, max_units: int) -> list[FramePlan]:
    plans = []
    while (plan := machine.next_frame(max_units)) is not None:
        machine.posted()
        plans.append(plan)
    return plans


class SenderWorld:
    """A prompt of two blocks, one chunk each, one frame each. Sends end when the world says."""

    def __init__(self) -> None:
        self.machine = OutgoingTransfer(num_layers=NUM_LAYERS, num_blocks=2)
        self.num_packing = 0
        self.num_in_flight = 0
        self.seen: list[Instruction] = []
        self.chunks = 0
        self.was_withdrawn = False

    def possible(self) -> dict[str, Callable[[], None]]:
        machine = self.machine
        steps: dict[str, Callable[[], None]] = {
            "ticket": lambda: self.run(machine.ticketed(make_ticket(0, 1))),
            "refused": lambda: self.run(machine.refused(Cancelled("no"))),
            "withdraw": self.withdraw,
            "abort": lambda: self.run(machine.abort_asked(9, Cancelled("gone"))),
            "lost": lambda: self.run(machine.peer_lost(failure(FailureReason.RECEIVER_LOST))),
            "expired": lambda: self.run(machine.expired(LeaseExpired("late"))),
        }
        if self.chunks < 2:
            steps[f"chunk{self.chunks}"] = self.compute
        else:
            steps["commit"] = lambda: self.run(machine.commit_asked(5))
        if machine.has_frame:
            steps[f"pack{machine.num_posted}"] = self.pack
        if self.num_packing:
            steps[f"post{machine.num_posted}"] = self.post
            steps["unpackable"] = lambda: self.run(machine.failed(failure(FailureReason.INTERNAL)))
        if self.num_in_flight:
            steps[f"settle{self.num_in_flight}"] = self.settle
            steps["break"] = lambda: self.settle(failure(FailureReason.LINK_LOST))
        if any(isinstance(seen, SendCommit) for seen in self.seen):
            steps["committed"] = lambda: self.run(machine.committed(None))
        return steps

    def run(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            if isinstance(instruction, FreeSources):
                assert self.num_packing == self.num_in_flight == 0, "freed while being read"
                assert self.machine.state.is_final
            if isinstance(instruction, SendAbortAck):
                assert self.num_packing == self.num_in_flight == 0, "acknowledged too early"
            if isinstance(instruction, SendAbort | SendAbortAck):
                assert instruction.num_frames_posted == self.machine.num_posted
            self.seen.append(instruction)

    def compute(self) -> None:
        self.chunks += 1
        self.machine.chunk_computed(self.chunks, [10, 11], None)

    def withdraw(self) -> None:
        self.was_withdrawn = self.was_withdrawn or not self.ended()
        self.run(self.machine.withdrawn())

    def pack(self) -> None:
        assert self.machine.next_frame(NUM_LAYERS) is not None
        self.num_packing += 1

    def post(self) -> None:
        self.num_packing -= 1
        if self.machine.may_post:
            self.num_in_flight += 1
            self.run(self.machine.posted()[1])
        else:
            self.run(self.machine.dropped())

    def settle(self, error: ServingError | None = None) -> None:
        self.num_in_flight -= 1
        self.run(self.machine.settled(error))

    def ended(self) -> bool:
        return any(isinstance(seen, ReportCommitted | ReportFailed) for seen in self.seen)

    def finish(self) -> None:
        if not self.ended() and not self.was_withdrawn:
            self.run(self.machine.peer_lost(failure(FailureReason.RECEIVER_LOST)))
        while self.num_packing:
            self.post()
        while self.num_in_flight:
            self.settle()
        reports = [s for s in self.seen if isinstance(s, ReportCommitted | ReportFailed)]
        assert len(reports) == (0 if self.was_withdrawn else 1), reports
        assert sum(isinstance(seen, FreeSources) for seen in self.seen) == 1
        assert sum(isinstance(seen, SendCommit) for seen in self.seen) <= 1
        assert self.machine.is_over
        if isinstance(reports and reports[0], ReportCommitted):
            assert self.machine.num_posted == 2


HAPPY = (
    *("ticket", "chunk0", "chunk1", "commit", "committed"),
    *("pack0", "post0", "pack1", "post1", "settle1", "settle2"),
)
TROUBLE = ("refused", "withdraw", "abort", "lost", "expired", "break", "unpackable")


@pytest.mark.parametrize("trouble", list(itertools.combinations(TROUBLE, 2)), ids="+".join)
def test_every_order_ends_once_and_frees_the_sources_when_nothing_reads_them(
    trouble: tuple[str, str],
) -> None:
    assert explore(SenderWorld, (*HAPPY, *trouble)) > 100


def test_every_order_without_trouble_commits_all_frames() -> None:
    class Untroubled(SenderWorld):
        def finish(self) -> None:
            while any(name in self.possible() for name in ("pack0", "pack1", "post0", "post1")):
                steps = self.possible()
                next(steps[name] for name in steps if name[:4] in ("pack", "post"))()
            assert SendCommit(2, 5) in self.seen
            self.run(self.machine.committed(None))
            super().finish()
            assert ReportCommitted() in self.seen

    steps = ("ticket", "chunk0", "chunk1", "commit", "pack0", "post0", "pack1", "post1")
    assert explore(Untroubled, (*steps, "settle1", "settle2")) > 10


def test_only_missing_blocks_are_sent() -> None:
    machine = OutgoingTransfer(num_layers=NUM_LAYERS, num_blocks=4)
    machine.chunk_computed(4, [40, 41, 42, 43], None)
    machine.ticketed(make_ticket(1, 3))
    plans = ship_all(machine, max_units=NUM_LAYERS * 8)
    assert [(plan.positions, plan.block_ids) for plan in plans] == [((1, 3), (41, 43))]


@pytest.mark.parametrize(
    ("num_blocks", "max_units", "frames"),
    [
        (2, 2, [((0, 1), layer, 1) for layer in range(5)]),
        (2, 5, [((0, 1), 0, 2), ((0, 1), 2, 2), ((0, 1), 4, 1)]),
        (2, 20, [((0, 1), 0, 5)]),
        (6, 4, [(at, layer, 1) for at in ((0, 1, 2), (3, 4, 5)) for layer in range(5)]),
    ],
    ids=["a layer", "some layers", "all", "less than a layer"],
)
def test_a_frame_carries_layers_of_as_many_blocks_as_fit(
    num_blocks: int, max_units: int, frames: list[object]
) -> None:
    machine = OutgoingTransfer(num_layers=5, num_blocks=num_blocks)
    machine.ticketed(make_ticket(*range(num_blocks)))
    machine.chunk_computed(num_blocks, list(range(7, 7 + num_blocks)), None)
    plans = ship_all(machine, max_units=max_units)
    assert [(plan.positions, plan.layer_start, plan.num_layers) for plan in plans] == frames


def test_each_chunk_is_sent_as_soon_as_it_is_computed() -> None:
    machine = OutgoingTransfer(num_layers=NUM_LAYERS, num_blocks=3)
    machine.chunk_computed(1, [4], "first")
    machine.chunk_computed(3, [4, 5, 6], "second")
    machine.ticketed(make_ticket(0, 1, 2))
    plans = ship_all(machine, max_units=NUM_LAYERS * 2)
    assert [(plan.after, plan.positions) for plan in plans] == [("first", (0,)), ("second", (1, 2))]


def test_a_prompt_held_entirely_by_the_peer_commits_without_a_frame() -> None:
    machine = OutgoingTransfer(num_layers=NUM_LAYERS, num_blocks=2)
    machine.chunk_computed(2, [1, 2], None)
    machine.ticketed(make_ticket())
    assert machine.commit_asked(9) == [SendCommit(0, 9)]


@pytest.mark.parametrize("missing", [(2,), (1, 0), (0, 0)])
def test_a_ticket_for_blocks_the_prompt_lacks_is_refused(missing: tuple[int, ...]) -> None:
    machine = OutgoingTransfer(num_layers=NUM_LAYERS, num_blocks=2)
    instructions = machine.ticketed(make_ticket(*missing))
    reports = [i for i in instructions if isinstance(i, ReportFailed)]
    assert [report.error.reason for report in reports] == ["ticket_invalid"]
    assert machine.state is TransferState.FAILED


def test_losing_the_peer_between_commit_and_its_answer_says_that_the_outcome_is_unknown() -> None:
    machine = OutgoingTransfer(num_layers=NUM_LAYERS, num_blocks=1)
    machine.ticketed(make_ticket())
    machine.commit_asked(9)
    reports = machine.peer_lost(failure(FailureReason.RECEIVER_LOST))
    errors = [report.error.reason for report in reports if isinstance(report, ReportFailed)]
    assert errors == [FailureReason.COMMIT_UNKNOWN.value]


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        (FailureReason.LINK_LOST, FailureReason.COMMIT_UNKNOWN),
        (FailureReason.INTERNAL, FailureReason.INTERNAL),
    ],
)
def test_a_send_that_breaks_behind_its_commit_tells_each_end_what_it_can_know(
    reason: FailureReason, told: FailureReason
) -> None:
    """What was on its way may have arrived; what never went out has not. The receiver counts it."""
    machine = OutgoingTransfer(num_layers=NUM_LAYERS, num_blocks=1)
    machine.ticketed(make_ticket(0))
    machine.chunk_computed(1, [1], None)
    ship_all(machine, max_units=NUM_LAYERS)
    machine.commit_asked(9)
    seen = machine.settled(failure(reason))
    errors = [each.error for each in seen if isinstance(each, SendAbort | ReportFailed)]
    assert [error and error.reason for error in errors] == [reason, told]


def test_committing_before_all_missing_blocks_are_computed_fails() -> None:
    machine = OutgoingTransfer(num_layers=NUM_LAYERS, num_blocks=2)
    machine.ticketed(make_ticket(0, 1))
    machine.chunk_computed(1, [1], None)
    ship_all(machine, max_units=NUM_LAYERS)
    reports = [i for i in machine.commit_asked(9) if isinstance(i, ReportFailed)]
    assert [report.error.reason for report in reports] == [FailureReason.INCOMPLETE.value]


def test_a_repeated_abort_is_acknowledged_again() -> None:
    machine = OutgoingTransfer(num_layers=NUM_LAYERS, num_blocks=1)
    machine.ticketed(make_ticket(0))
    machine.abort_asked(4, Cancelled("gone"))
    assert machine.abort_asked(4, Cancelled("gone")) == [SendAbortAck(4, 0)]


# ---- layer by layer -------------------------------------------------------------------------


def units(plans: list[FramePlan]) -> list[tuple[int, int]]:
    """(position, layer) of every unit, in the order sent."""
    return [
        (position, layer)
        for plan in plans
        for layer in range(plan.layer_start, plan.layer_start + plan.num_layers)
        for position in plan.positions
    ]


@pytest.mark.parametrize("ticket_at", range(6))
@pytest.mark.parametrize("max_units", [1, 2, 3, 100])
def test_every_missing_unit_is_sent_once_whenever_the_ticket_comes(
    ticket_at: int, max_units: int
) -> None:
    machine = OutgoingTransfer(num_layers=4, num_blocks=3)
    reports = [(2, 1), (2, 3), (2, 4), (3, 4), (3, 4)]
    plans = []
    for index, (num_blocks, layer_end) in enumerate(reports):
        if index == ticket_at:
            machine.ticketed(make_ticket(0, 2))
        machine.layers_computed(num_blocks, [7, 8, 9][:num_blocks], layer_end, layer_end)
        plans += ship_all(machine, max_units=max_units)
    if ticket_at == len(reports):
        machine.ticketed(make_ticket(0, 2))
    plans += ship_all(machine, max_units=max_units)
    assert sorted(units(plans)) == [(p, layer) for p in (0, 2) for layer in range(4)]
    assert all(plan.after >= plan.layer_start + plan.num_layers for plan in plans)
    assert all(len(plan.positions) * plan.num_layers <= max_units for plan in plans)
    assert {plan.block_ids[i] for plan in plans for i in range(len(plan.positions))} == {7, 9}
    assert machine.commit_asked(5) == [SendCommit(len(plans), 5)]


def test_a_commit_waits_for_the_last_layer() -> None:
    machine = OutgoingTransfer(num_layers=2, num_blocks=1)
    machine.ticketed(make_ticket(0))
    machine.layers_computed(1, [3], 1, None)
    ship_all(machine, max_units=9)
    reports = [i for i in machine.commit_asked(9) if isinstance(i, ReportFailed)]
    assert [report.error.reason for report in reports] == [FailureReason.INCOMPLETE.value]


def test_a_chunk_that_was_sent_by_layers_is_not_sent_again() -> None:
    machine = OutgoingTransfer(num_layers=2, num_blocks=2)
    machine.ticketed(make_ticket(0, 1))
    machine.layers_computed(1, [3], 1, None)
    machine.layers_computed(1, [3], 2, None)
    machine.chunk_computed(1, [3, 4], None)
    assert units(ship_all(machine, max_units=9)) == [(0, 0), (0, 1)]
    machine.chunk_computed(2, [3, 4], None)
    assert units(ship_all(machine, max_units=9)) == [(1, 0), (1, 1)]
