"""Bugs that others had when something failed: not told, told wrong, or taken for success.

Each test names the reports it comes from. `python -m tests.mutations` takes the line out that
protects from each and shows that its test fails.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import torch

from cluster.errors import Overloaded, TransferFailed
from cluster.request import KVLoadFailurePolicy
from kv_transfer.failures import FailureReason, failure
from kv_transfer.receiving.intake_instructions import Free, ReportFailed
from tests.kv_faults import HandDriven, two_frames
from tests.kv_transfer.catalogue_worlds import TABLE, Gate, stop_timers, with_pair, with_peer
from tests.kv_transfer.receiving.intake_world import IntakeWorld, make_sequence
from tests.kv_twins import (
    BLOCK_SIZE,
    DecodeSide,
    PrefillSide,
    make_request,
    until,
)


def broken(*args: object, **options: object) -> Any:
    raise RuntimeError("nobody foresaw this")


# ---- a failure that looks like success --------------------------------------------------------


def test_a_receive_that_fails_starts_nothing() -> None:
    """vllm#52234, vllm#52232, vllm#52276: garbage, or the previous prompt's answer, with 200."""

    async def scenario(peer: HandDriven, decode: DecodeSide) -> None:
        request = make_request(2 * BLOCK_SIZE)
        ticket, frames = await two_frames(peer, request)
        longer = torch.cat([frames[0][1], frames[0][1]])
        await peer.post(frames[0][0], longer)
        await peer.post(*frames[1])
        peer.commit(ticket, num_frames=2)
        peer.acknowledge((await peer.next("abort")).abort, num_frames_posted=2)
        await until(lambda: request.sequence_id not in decode.source.owned)
        assert decode.source.of(request.sequence_id) == ["reserved", "failed", "released"]
        assert decode.receiver.agent.stats.failures.total() == 1

    with_peer(scenario)


def test_an_error_that_nobody_foresaw_is_a_failure() -> None:
    """vllm#52234, vllm-backport#33: an unknown shape of failure was taken for none."""

    async def scenario(peer: HandDriven, decode: DecodeSide) -> None:
        decode.receiver.agent.pool.begin_scatter = broken  # type: ignore[method-assign]
        request = make_request(2 * BLOCK_SIZE)
        ticket, frames = await two_frames(peer, request)
        for header, payload in frames:
            await peer.post(header, payload)
        peer.commit(ticket, num_frames=2)
        abort = (await peer.next("abort")).abort
        assert abort.error.reason == "unknown"
        peer.acknowledge(abort, num_frames_posted=2)
        await until(lambda: request.sequence_id not in decode.source.owned)
        assert decode.source.of(request.sequence_id) == ["reserved", "failed", "released"]
        staging = decode.receiver.agent.staging
        assert staging.num_free == staging.num_slots

    with_peer(scenario)


def test_a_receiver_that_cannot_go_on_gives_the_session_up() -> None:
    """vllm#52232: the thread that received had died, and nobody knew."""

    async def scenario(peer: HandDriven, decode: DecodeSide) -> None:
        request = make_request(2 * BLOCK_SIZE)
        _, frames = await two_frames(peer, request)
        decode.receiver.frame_arrived = broken  # type: ignore[method-assign]
        peer.post(*frames[0])
        await until(lambda: request.sequence_id not in decode.source.owned)
        assert decode.source.errors[request.sequence_id].reason == "unknown"
        await until(lambda: peer.is_ended)

    with_peer(scenario)


@pytest.mark.parametrize(
    ("reason", "cause"),
    [
        *((reason, reason) for reason in ("prefill_lost", "transfer_timeout", "lease_expired")),
        *((reason, reason) for reason in ("digest_mismatch", "layout_mismatch", "unknown")),
        ("link_lost", "prefill_lost"),
        ("incomplete", "unknown"),
        ("a reason of a later version", "unknown"),
    ],
)
def test_a_client_gets_one_of_six_causes_and_whatever_is_new_is_unknown(
    reason: str, cause: str
) -> None:
    """vllm#52276."""
    assert TransferFailed("no", reason=reason).cause == cause


def test_nothing_starts_before_the_copy_into_its_blocks_has_ended() -> None:
    """sgl#13231: "done" was said before the GPU's copy ended."""

    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        gate, pool = Gate(), decode.receiver.agent.pool
        pool.begin_scatter = gate.around(pool.begin_scatter)  # type: ignore[method-assign]
        request = make_request(30)
        name = request.sequence_id
        prefill.hand_off(decode, request)
        prefill.compute(request, TABLE)
        prefill.sender.commit(name, 1)
        await until(lambda: len(gate.begun) == 1)
        other = make_request(BLOCK_SIZE)
        prefill.hand_off(decode, other)
        await until(lambda: decode.source.of(other.sequence_id) == ["reserved"])
        assert decode.source.of(name) == ["reserved"]
        gate.opened.set()
        await until(lambda: decode.source.of(name) == ["reserved", "started"])
        prefill.sender.abort(other.sequence_id)

    with_pair(scenario)


class StillComputing:
    """An event that has not happened when it is first asked about."""

    def __init__(self) -> None:
        self.has_happened = False

    def query(self) -> bool:
        happened, self.has_happened = self.has_happened, True
        return happened


def test_blocks_are_packed_behind_the_event_that_says_they_are_computed() -> None:
    """sgl#13231, at the sender."""

    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        gate, pool = Gate(), prefill.sender.agent.pool
        gate.opened.set()
        pool.begin_gather = gate.around(pool.begin_gather)  # type: ignore[method-assign]
        request = make_request(30)
        computed = StillComputing()
        prefill.hand_off(decode, request)
        prefill.sender.chunk_computed(request.sequence_id, 30, TABLE, computed)
        prefill.sender.commit(request.sequence_id, 1)
        await until(lambda: prefill.owner.of(request.sequence_id) == ["committed", "free"])
        assert [options["after"] for options in gate.begun] == [computed]

    with_pair(scenario)


@pytest.mark.parametrize("num_held", [1, 3, 7])
def test_a_partial_hit_is_placed_by_position_never_by_length(num_held: int) -> None:
    """vllm#48633 (C3), vllm#48758: one side cut the front, the other the end."""

    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        decode.source.num_held_blocks = num_held
        before = decode.pool.clone()
        request = make_request(30)
        name = request.sequence_id
        prefill.hand_off(decode, request)
        prefill.compute(request, TABLE)
        prefill.sender.commit(name, 1)
        await until(lambda: prefill.owner.of(name) == ["committed", "free"])
        taken = list(decode.source.owned[name])
        held, missing = taken[:num_held], taken[num_held:]
        assert torch.equal(decode.pool[:, held], before[:, held])
        assert torch.equal(decode.pool[:, missing], prefill.pool[:, TABLE[num_held:]])

    with_pair(scenario)


# ---- a failure that nobody is told of ---------------------------------------------------------


def test_blocks_that_cannot_be_packed_fail_the_transfer_at_both_ends() -> None:
    """vllm#50754, vllm#55181: the prefill node could not post, and only logged it."""

    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        prefill.sender.agent.pool.begin_gather = broken  # type: ignore[method-assign]
        request = make_request(30)
        name = request.sequence_id
        prefill.hand_off(decode, request)
        prefill.compute(request, TABLE)
        await until(lambda: prefill.owner.of(name) == ["failed", "free"])
        await until(lambda: decode.source.of(name)[1:] == ["failed", "released"])

    with_pair(scenario)


def test_a_send_that_fails_fails_the_transfer_at_both_ends() -> None:
    """vllm-ascend#13099: the exception did not reach the policy."""

    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        request = make_request(30)
        name = request.sequence_id
        prefill.hand_off(decode, request)
        await until(lambda: decode.source.of(name) == ["reserved"])
        [peer] = prefill.sender._peers.values()

        def refuse(*_: object) -> asyncio.Future[None]:
            refused: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            refused.set_exception(failure(FailureReason.LINK_LOST))
            return refused

        assert peer._endpoint is not None
        peer._endpoint.send = refuse  # type: ignore[method-assign, assignment]
        prefill.compute(request, TABLE)
        await until(lambda: prefill.owner.of(name) == ["failed", "free"])
        assert prefill.owner.errors[name].reason == "link_lost"
        await until(lambda: "failed" in decode.source.of(name))

    with_pair(scenario)


@pytest.mark.parametrize("end", ["prefill", "decode"])
def test_an_abort_at_one_end_frees_the_other_at_once(end: str) -> None:
    """sgl#28651: slots held for 300 s, 89 % of requests failed; sgl#30233."""

    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        stop_timers(prefill, decode)
        request = make_request(30)
        name = request.sequence_id
        prefill.hand_off(decode, request)
        prefill.sender.chunk_computed(name, 13, TABLE, None)
        await until(lambda: decode.receiver.agent.stats.frames == 1)
        if end == "prefill":
            prefill.sender.abort(name)
        else:
            decode.receiver.cancel(name)
        await until(lambda: name not in decode.source.owned, seconds=3)
        await until(lambda: "free" in prefill.owner.of(name), seconds=3)

    with_pair(scenario)


def test_sources_come_back_from_a_decode_node_that_never_answers() -> None:
    """vllm#41269: blocks stranded for 480 s between two nodes' bookkeeping."""

    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        stop_timers(prefill, decode)
        decode.source.may_reserve.clear()
        request = make_request(30)
        prefill.hand_off(decode, request)
        await until(lambda: decode.receiver.num_transfers == 1)
        prefill.clock.advance(30.0)
        prefill.sender.sweep()
        assert prefill.owner.of(request.sequence_id) == ["failed", "free"]
        assert prefill.owner.errors[request.sequence_id].reason == "lease_expired"
        decode.source.may_reserve.set()

    with_pair(scenario)


def test_a_decode_node_that_has_no_place_says_so_to_the_prefill_node() -> None:
    """vllm#41269: only the router was told."""

    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        stop_timers(prefill, decode)
        decode.source.refusal = Overloaded("The pool is full.")
        request = make_request(30)
        prefill.hand_off(decode, request)
        await until(lambda: prefill.owner.of(request.sequence_id) == ["failed", "free"], seconds=3)
        assert prefill.owner.errors[request.sequence_id].code == "overloaded"

    with_pair(scenario)


# ---- computing again what did not arrive ------------------------------------------------------


def test_only_what_stands_before_the_first_bad_block_is_kept() -> None:
    """vllm#55297: the same lookup, of the same bad block, failed for ever."""
    sequence = replace(make_sequence(), kv_load_failure_policy=KVLoadFailurePolicy.RECOMPUTE)
    world = IntakeWorld(sequence, num_frames=3)
    world.answer(world.side)
    for _ in range(3):
        world.post(world.side)
        world.arrive(world.side)
    world.end(world.side, 0)
    world.end(world.side, 2)
    world.end(world.side, 1, failure(FailureReason.DIGEST_MISMATCH))
    [failed] = [sent for sent in world.sent if isinstance(sent, ReportFailed)]
    assert failed.num_good_blocks == 1
    world.ack(world.side)
    [freed] = [sent for sent in world.sent if isinstance(sent, Free)]
    assert freed.num_good_blocks == 1
