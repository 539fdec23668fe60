"""Bugs that others had when blocks were written or read by those who owned them no more.

Each test names the reports it comes from. `python -m tests.mutations` takes the line out that
protects from each and shows that its test fails.
"""

from __future__ import annotations

import asyncio

import pytest
import torch

from cluster.errors import LeaseExpired
from cluster.proto import node_pb2 as pb
from kv_transfer.failures import FailureReason, failure
from kv_transfer.receiving.intake_instructions import (
    Free,
    ReportFailed,
    Revoke,
)
from kv_transfer.sending.outgoing import OutgoingTransfer
from kv_transfer.sending.outgoing_instructions import FreeSources, SendAbort, SendAbortAck
from tests.kv_faults import HandDriven, two_frames
from tests.kv_transfer.catalogue_worlds import (
    TABLE,
    Gate,
    StuckTransport,
    stop_timers,
    with_hanging_link,
    with_pair,
    with_peer,
)
from tests.kv_transfer.receiving.intake_world import (
    DRAIN_SECONDS,
    LEASE_SECONDS,
    SESSION,
    STALL_SECONDS,
    of_kind,
    reserved_world,
)
from tests.kv_transfer.sending.test_outgoing import NUM_LAYERS, make_ticket, ship_all
from tests.kv_twins import (
    BLOCK_SIZE,
    UNIT_BYTES,
    DecodeSide,
    PrefillSide,
    make_request,
    until,
)


def posted_machine(num_frames: int) -> OutgoingTransfer:
    """That many frames of one block each are in flight."""
    machine = OutgoingTransfer(num_layers=NUM_LAYERS, num_blocks=num_frames)
    machine.ticketed(make_ticket(*range(num_frames)))
    for block in range(num_frames):
        machine.chunk_computed(block + 1, list(range(num_frames)), None)
        ship_all(machine, max_units=NUM_LAYERS)
    return machine


# ---- the receiver frees, the sender writes later -------------------------------------------


def test_a_write_that_lands_after_an_abort_reaches_no_block() -> None:
    """sgl#24527, sgl#27372, sgl#32564, sgl#35049, vllm#48633 (C1)."""

    async def scenario(peer: HandDriven, decode: DecodeSide) -> None:
        request = make_request(2 * BLOCK_SIZE)
        name = request.sequence_id
        _, frames = await two_frames(peer, request)
        staging = decode.receiver.agent.staging
        await peer.post_header(frames[0][0])
        await until(lambda: staging.num_free < staging.num_slots)
        decode.receiver.cancel(name)
        peer.acknowledge((await peer.next("abort")).abort, num_frames_posted=1)
        other = make_request(BLOCK_SIZE)
        peer.reserve(other)
        await peer.ticket()  # so the acknowledgement has been read, too
        assert not set(decode.source.owned[other.sequence_id]) & set(decode.source.owned[name])
        before = decode.pool.clone()
        await peer.endpoint.send(frames[0][1], frames[0][0].nonce)
        await until(lambda: name not in decode.source.owned)
        assert torch.equal(decode.pool, before)

    with_peer(scenario)


def test_an_abort_is_acknowledged_when_the_last_send_has_ended() -> None:
    """sgl#38961: the target of the acknowledgement was dropped with the request."""
    machine = posted_machine(2)
    [abort, *_] = machine.expired(LeaseExpired("late"))
    assert isinstance(abort, SendAbort)
    assert machine.abort_asked(9, LeaseExpired("late")) == []
    assert machine.settled() == []
    assert machine.settled() == [SendAbortAck(9, 2), FreeSources()]


def test_a_drain_that_takes_too_long_revokes_and_does_not_free() -> None:
    """sgl#38961: the timeout freed."""
    world = reserved_world()
    world.post(world.side)
    world.cancel(world.side)
    world.tick(DRAIN_SECONDS)
    assert of_kind(world, Revoke)
    assert not of_kind(world, Free)
    world.cut()
    assert of_kind(world, Free)


def test_blocks_come_back_from_a_prefill_node_that_says_nothing_any_more() -> None:
    """vllm#46283, vllm#35943, vllm#50719, vllm#55870."""
    world = reserved_world()
    world.post(world.side)
    world.tick(LEASE_SECONDS)
    [failed] = of_kind(world, ReportFailed)
    assert failed.error.reason == "lease_expired"
    world.tick(DRAIN_SECONDS)
    world.cut()
    assert of_kind(world, Free)


def test_a_payload_that_never_comes_ends_its_transfer_however_alive_its_peer_is() -> None:
    """vllm#35943, nixl#2047: a dead link stays in progress for ever."""
    world = reserved_world()
    world.post(world.side)
    world.arrive(world.side)
    transfer_id = world.side.sequence.transfer_id
    while world.now < STALL_SECONDS:
        world.intake.renewed(SESSION, transfer_id, LEASE_SECONDS, world.now)
        world.tick(LEASE_SECONDS / 6)
    [failed] = of_kind(world, ReportFailed)
    assert failed.error.reason == "transfer_timeout"


def test_sends_that_nobody_takes_end_the_transfer_and_then_the_connection() -> None:
    """vllm#35943, seen from the sender: its source blocks were held for ever."""

    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        stop_timers(prefill, None)
        request = make_request(30)
        name = request.sequence_id
        prefill.hand_off(decode, request)
        prefill.compute(request, TABLE)
        [sending] = prefill.sender._sendings
        await until(lambda: sending.machine.num_posted == 1)
        prefill.clock.advance(20.0)
        prefill.sender.sweep()
        assert prefill.owner.of(name) == []
        prefill.clock.advance(5.0)
        prefill.sender.sweep()
        assert prefill.owner.of(name) == ["failed"]  # its sends still read the blocks
        assert prefill.owner.errors[name].reason == "transfer_timeout"
        assert prefill.sender.num_quarantined_blocks == len(TABLE)
        prefill.clock.advance(1.0)
        prefill.sender.sweep()
        await until(lambda: prefill.owner.of(name) == ["failed", "free"])

    with_hanging_link(scenario, stall_seconds=25.0)


def test_after_one_bad_frame_the_blocks_stay_until_its_sibling_has_landed() -> None:
    """vllm#56104: a failure freed what another handle still wrote."""
    world = reserved_world(num_frames=2)
    side = world.side
    for _ in range(2):
        world.post(side)
        world.arrive(side)
    world.end(side, 0, failure(FailureReason.DIGEST_MISMATCH))
    world.ack(side)
    assert of_kind(world, ReportFailed)
    assert not of_kind(world, Free)
    world.end(side, 1)
    assert of_kind(world, Free)


def test_after_one_broken_send_the_sources_stay_until_its_sibling_has_ended() -> None:
    """vllm#56104, at the sender."""
    machine = posted_machine(2)
    ended = machine.settled(failure(FailureReason.LINK_LOST))
    assert FreeSources() not in ended
    assert FreeSources() in machine.settled()


# ---- the sender's blocks are used again ------------------------------------------------------


def test_a_frame_whose_lease_ran_out_while_it_was_packed_is_not_sent() -> None:
    """vllm#55470: the source was used again before a deferred write."""

    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        gate, pool = Gate(), prefill.sender.agent.pool
        pool.begin_gather = gate.around(pool.begin_gather)  # type: ignore[method-assign]
        stop_timers(prefill, None)
        request = make_request(30)
        prefill.hand_off(decode, request)
        prefill.compute(request, TABLE)
        await until(lambda: bool(gate.begun))
        prefill.clock.advance(30.0)
        gate.opened.set()
        await until(lambda: prefill.owner.of(request.sequence_id) == ["failed", "free"])
        assert prefill.owner.errors[request.sequence_id].reason == "lease_expired"
        assert decode.receiver.agent.stats.frames == 0

    with_pair(scenario)


def test_an_abort_of_a_transfer_that_is_long_over_is_still_acknowledged() -> None:
    """trt#12542: the receiver waited for ever for a sender that had forgotten."""

    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        request = make_request(30)
        handoff = prefill.hand_off(decode, request)
        await until(lambda: decode.source.of(request.sequence_id) == ["reserved"])
        prefill.sender.abort(request.sequence_id)
        assert prefill.sender.num_transfers == 0
        [peer] = prefill.sender._peers.values()
        sent: list[pb.SenderFrame] = []
        peer.send = sent.append  # type: ignore[method-assign, assignment]
        abort = pb.ReceiverAbort(transfer_id=handoff.transfer_id, epoch=3)
        prefill.clock.advance(59.0)
        prefill.sender.sweep()
        prefill.sender.received(peer, pb.ReceiverFrame(abort=abort))
        [answer] = sent
        assert answer.abort_ack.transfer_id == handoff.transfer_id
        assert answer.abort_ack.epoch == 3

    with_pair(scenario)


@pytest.mark.parametrize("moment", ["frame", "commit"])
def test_nothing_that_comes_after_the_lease_is_taken_even_before_a_sweep(moment: str) -> None:
    """vllm#21570, vllm#20139, vllm#41383: a node that was stopped finds its mail first."""

    async def scenario(peer: HandDriven, decode: DecodeSide) -> None:
        stop_timers(None, decode)
        request = make_request(2 * BLOCK_SIZE)
        ticket, frames = await two_frames(peer, request)
        await peer.post(*frames[0])
        if moment == "commit":
            await peer.post(*frames[1])
            await until(lambda: decode.receiver.agent.stats.frames == 2)
            decode.clock.advance(30.0)
            peer.commit(ticket, num_frames=2)
        else:
            decode.clock.advance(30.0)
            await peer.post(*frames[1])
        abort = (await peer.next("abort")).abort
        assert abort.error.reason == "lease_expired"
        assert "started" not in decode.source.of(request.sequence_id)
        peer.acknowledge(abort, num_frames_posted=2)
        await until(lambda: request.sequence_id not in decode.source.owned)

    with_peer(scenario)


def test_a_source_block_that_another_prompt_has_overwritten_is_refused() -> None:
    """aws-do-eks#84: 8 of 42 requests were answered from blocks used again, all with 200."""

    async def scenario(peer: HandDriven, decode: DecodeSide) -> None:
        request = make_request(2 * BLOCK_SIZE)
        ticket, frames = await two_frames(peer, request)
        _, other = await peer.header(ticket, 0, {0: 20})
        header, overwritten = frames[0]
        overwritten[: NUM_LAYERS * UNIT_BYTES] = other[: NUM_LAYERS * UNIT_BYTES]
        await peer.post(header, overwritten)
        await peer.post(*frames[1])
        peer.commit(ticket, num_frames=2)
        abort = (await peer.next("abort")).abort
        assert abort.error.reason == "digest_mismatch"
        assert "started" not in decode.source.of(request.sequence_id)
        peer.acknowledge(abort, num_frames_posted=2)
        await until(lambda: request.sequence_id not in decode.source.owned)

    with_peer(scenario)


# ---- what is cut off must have ended ----------------------------------------------------------


def test_what_a_broken_connection_does_not_give_back_stays_out_of_use_and_is_counted() -> None:
    """pegaflow#403, trt#14565: a timeout dropped the memory of a transfer in flight."""

    async def scenario(peer: HandDriven, decode: DecodeSide) -> None:
        request = make_request(2 * BLOCK_SIZE)
        agent, full = decode.receiver.agent, asyncio.Event()
        agent.quarantine.watch(lambda _: full.set())
        _, frames = await two_frames(peer, request)
        await peer.post_header(frames[0][0])
        await until(lambda: agent.staging.num_free < agent.staging.num_slots)
        [session] = decode.receiver._sessions

        async def does_not_end() -> bool:
            return False

        assert session._endpoint is not None
        cut, session._endpoint.close = session._endpoint.close, does_not_end  # type: ignore[method-assign]
        await peer.stream.close()
        await until(lambda: agent.quarantine.num_kept_blocks > 0)
        assert (agent.quarantine.num_kept_blocks, agent.quarantine.num_kept_slots) == (2, 1)
        assert request.sequence_id in decode.source.owned
        assert decode.receiver.num_quarantined_blocks == 2
        assert decode.receiver.num_transfers == 0, "a drain waits in vain"
        assert full.is_set()  # a quarter of four slots
        await cut()

    with_peer(scenario, gives_all_back=False)


@pytest.mark.parametrize(("num_computed_tokens", "num_sources"), [(30, len(TABLE)), (13, 3)])
def test_sources_of_sends_that_do_not_end_with_their_connection_stay_held_and_are_counted(
    num_computed_tokens: int, num_sources: int
) -> None:
    """pegaflow#403, at the sender: whoever gets such a block next would be sent in its place. What
    was never computed has no source."""

    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        request = make_request(30)
        name, agent, full = request.sequence_id, prefill.sender.agent, asyncio.Event()
        agent.quarantine.watch(lambda _: full.set())
        prefill.hand_off(decode, request)
        prefill.sender.chunk_computed(name, num_computed_tokens, TABLE, None)
        [sending] = prefill.sender._sendings
        await until(lambda: sending.machine.num_posted == 1)
        assert not prefill.sender.is_stuck(name)
        prefill.sender.abort(name)
        prefill.clock.advance(DRAIN_SECONDS)
        await until(full.is_set)  # a quarter of four slots
        kept = agent.quarantine.num_kept_blocks, agent.quarantine.num_kept_slots
        assert kept == (num_sources, 1)
        assert prefill.owner.of(name) == []
        assert prefill.sender.num_quarantined_blocks == num_sources
        assert prefill.sender.num_transfers == 0, "a drain waits in vain"
        assert prefill.sender.is_stuck(name)
        assert agent.staging.num_free == agent.staging.num_slots - 1
        assert isinstance(agent.transport, StuckTransport)
        agent.transport.let_go()
        await until(lambda: prefill.owner.of(name) == ["free"])

    with_hanging_link(scenario, StuckTransport)


def test_a_staging_slot_is_not_given_to_others_while_a_send_reads_it() -> None:
    """pegaflow#403, at the sender."""

    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        request = make_request(30)
        staging = prefill.sender.agent.staging
        prefill.hand_off(decode, request)
        prefill.compute(request, TABLE)
        await until(lambda: staging.num_free < staging.num_slots)
        [sending] = prefill.sender._sendings
        await until(lambda: sending.machine.num_posted == 1)
        prefill.sender.abort(request.sequence_id)
        assert staging.num_free < staging.num_slots
        assert prefill.owner.of(request.sequence_id) == []

    with_hanging_link(scenario)
