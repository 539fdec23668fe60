"""What was announced does not come, and the request has a deadline."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kv_transfer.receiving.intake_instructions import ReportFailed
from kv_transfer.transfer import MIN_STALL_SECONDS, stall_limit
from tests.kv_transfer.catalogue_worlds import TABLE, stop_timers, with_hanging_link
from tests.kv_transfer.receiving.intake_world import IntakeWorld, make_sequence, of_kind
from tests.kv_twins import DecodeSide, PrefillSide, make_request, until

DEADLINE_SECONDS = 20.0


@pytest.mark.parametrize(
    ("deadline_seconds", "seconds"), [(None, 60.0), (900.0, 60.0), (20.0, 10.0), (1.0, 2.0)]
)
def test_half_of_what_a_request_has_left_is_waited_for_a_peer(
    deadline_seconds: float | None, seconds: float
) -> None:
    assert MIN_STALL_SECONDS == 2.0
    assert stall_limit(60.0, deadline_seconds) == seconds


def test_a_receiver_gives_a_payload_up_while_another_pair_has_time_for_it() -> None:
    world = IntakeWorld(make_sequence(deadline=DEADLINE_SECONDS))
    world.answer(world.side)
    world.post(world.side)
    world.arrive(world.side)
    world.tick(0.49 * DEADLINE_SECONDS)
    assert not of_kind(world, ReportFailed)
    world.tick(0.01 * DEADLINE_SECONDS)
    [failed] = of_kind(world, ReportFailed)
    assert failed.error.reason == "transfer_timeout"


def test_a_sender_gives_a_peer_up_while_another_pair_has_time_for_its_request() -> None:
    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        stop_timers(prefill, None)
        request = replace(make_request(30), deadline_seconds=DEADLINE_SECONDS)
        name = request.sequence_id
        prefill.hand_off(decode, request)
        prefill.compute(request, TABLE)
        [sending] = prefill.sender._sendings
        await until(lambda: sending.machine.num_posted == 1)
        prefill.clock.advance(0.49 * DEADLINE_SECONDS)
        prefill.sender.sweep()
        assert prefill.owner.of(name) == []
        prefill.clock.advance(0.01 * DEADLINE_SECONDS)
        prefill.sender.sweep()
        assert prefill.owner.of(name) == ["failed"]
        assert prefill.owner.errors[name].reason == "transfer_timeout"
        prefill.clock.advance(prefill.sender.agent.config.drain_seconds)
        prefill.sender.sweep()
        await until(lambda: prefill.owner.of(name) == ["failed", "free"])

    with_hanging_link(scenario)
