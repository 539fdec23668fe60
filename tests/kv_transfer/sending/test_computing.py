"""Nothing is planned before it is computed, and nothing is lost at the end."""

from __future__ import annotations

from dataclasses import dataclass

from kv_transfer.sending.computing import Computing, ComputingLayers
from kv_transfer.sending.outgoing import FramePlan, OutgoingTransfer
from kv_transfer.sending.outgoing_instructions import SendCommit
from kv_transfer.transfer import Ticket

NUM_LAYERS = 4
TABLE = (10, 11, 12)


@dataclass(eq=False)
class Event:
    has_happened: bool = False

    def query(self) -> bool:
        return self.has_happened


def make_machine() -> OutgoingTransfer:
    machine = OutgoingTransfer(num_layers=NUM_LAYERS, num_blocks=len(TABLE))
    ticket = Ticket(
        transfer_id=b"t" * 16,
        incarnation=1,
        epoch=2,
        nonce=3,
        expires_in_seconds=30.0,
        missing_positions=(0, 1, 2),
    )
    machine.ticketed(ticket)
    return machine


def group(layer_end: int, done: Event | None) -> Computing:
    return Computing(len(TABLE), TABLE, layer_end, done)


def drain(machine: OutgoingTransfer) -> list[FramePlan]:
    plans = []
    while (plan := machine.next_frame(1000)) is not None:
        machine.posted()
        machine.settled()
        plans.append(plan)
    return plans


def test_layers_are_planned_when_their_event_has_happened() -> None:
    machine, first, second = make_machine(), Event(), Event()
    computing = ComputingLayers(machine)
    groups = [group(2, first), group(4, second)]
    assert all(computing.add(each) for each in groups)
    assert not machine.has_frame
    computing.computed(groups[0])
    assert [(plan.layer_start, plan.num_layers, plan.after) for plan in drain(machine)] == [
        (0, 2, None)
    ]
    computing.computed(groups[1])
    assert [(plan.layer_start, plan.num_layers) for plan in drain(machine)] == [(2, 2)]


def test_what_has_happened_already_is_not_waited_for() -> None:
    machine = make_machine()
    computing = ComputingLayers(machine)
    assert not computing.add(group(2, Event(has_happened=True)))
    assert not computing.add(group(4, None))
    assert len(drain(machine)) == 2


def test_layers_that_are_done_take_those_before_them_along_in_order() -> None:
    """One stream computes them: what is behind an event was done before it."""
    machine = make_machine()
    computing = ComputingLayers(machine)
    first = group(2, Event())
    assert computing.add(first)
    assert not computing.add(group(4, Event(has_happened=True)))
    assert [plan.layer_start for plan in drain(machine)] == [0, 2]
    computing.computed(first)
    assert not machine.has_frame


def test_a_commit_finds_all_layers_also_those_nobody_has_told_of() -> None:
    machine, last = make_machine(), Event()
    computing = ComputingLayers(machine)
    late = group(4, last)
    computing.add(group(2, None))
    computing.add(late)
    computing.hand_over()
    assert machine.commit_asked(7) == []
    plans = []
    while (plan := machine.next_frame(1000)) is not None:
        plans.append(plan)
        _, instructions = machine.posted()
    assert [plan.after for plan in plans] == [None, last]
    assert instructions == [SendCommit(2, 7)]
    computing.computed(late)
    assert not machine.has_frame
