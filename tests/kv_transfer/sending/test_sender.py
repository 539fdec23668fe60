"""Hand-offs from pool to pool: the in-process transport, a real control stream, no engine."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from cluster.errors import HandshakeMismatch, Overloaded
from cluster.node import Incarnation, NodeId
from kv_transfer.handshake import Compatibility
from kv_transfer.transports.loopback import LoopbackNetwork, LoopbackTransport
from tests.kv_transfer.catalogue_worlds import TABLE, Gate, with_pair
from tests.kv_twins import (
    DecodeSide,
    PrefillSide,
    decode_side,
    make_request,
    prefill_side,
    until,
)

if TYPE_CHECKING:
    from cluster.request import SequenceRequest


async def complete(prefill: PrefillSide, decode: DecodeSide, request: SequenceRequest) -> None:
    """Hand one whole prompt off and compare every byte."""
    name = request.sequence_id
    prefill.hand_off(decode, request)
    prefill.compute(request, TABLE)
    prefill.sender.commit(name, 7)
    await until(lambda: prefill.owner.of(name) == ["committed", "free"])
    taken = list(decode.source.owned[name])
    missing = slice(decode.source.num_held_blocks, None)
    assert torch.equal(decode.pool[:, taken[missing]], prefill.pool[:, TABLE[missing]])


def test_every_byte_of_the_prompt_arrives_in_the_blocks_of_the_other_pool() -> None:
    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        request = make_request(30, salt=b"tenant")
        await complete(prefill, decode, request)
        assert decode.source.of(request.sequence_id) == ["reserved", "started"]
        assert decode.source.first_tokens[request.sequence_id] == 7

    with_pair(scenario)


@pytest.mark.parametrize("unit_bytes", [64, 1024, 2048, 4096])
def test_any_fit_of_units_into_slots_moves_the_same_bytes(unit_bytes: int) -> None:
    """A slot of 4096 bytes holds many blocks, one block and a bit, layers of one, or one layer."""

    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        await complete(prefill, decode, make_request(32))

    with_pair(scenario, unit_bytes=unit_bytes)


def test_frames_go_out_while_later_chunks_are_still_computed() -> None:
    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        request = make_request(30)
        name = request.sequence_id
        prefill.hand_off(decode, request)
        prefill.sender.chunk_computed(name, 13, TABLE, None)
        await until(lambda: decode.receiver.agent.stats.frames == 1)
        prefill.sender.chunk_computed(name, 30, TABLE, None)
        prefill.sender.commit(name, 3)
        await until(lambda: prefill.owner.of(name) == ["committed", "free"])
        taken = list(decode.source.owned[name])
        assert torch.equal(decode.pool[:, taken], prefill.pool[:, TABLE])

    with_pair(scenario)


def test_a_block_is_sent_only_when_all_its_tokens_are_computed() -> None:
    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        request = make_request(30)
        prefill.hand_off(decode, request)
        await until(lambda: decode.source.of(request.sequence_id) == ["reserved"])
        prefill.sender.chunk_computed(request.sequence_id, 3, TABLE, None)
        prefill.sender.abort(request.sequence_id)
        await until(lambda: decode.source.of(request.sequence_id)[-1] == "released")
        assert prefill.sender.agent.stats.frames == 0

    with_pair(scenario)


def test_blocks_that_the_decode_node_holds_are_not_sent() -> None:
    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        decode.source.num_held_blocks = 5
        held = decode.pool.clone()
        request = make_request(30)
        await complete(prefill, decode, request)
        kept = list(decode.source.owned[request.sequence_id][:5])
        assert torch.equal(decode.pool[:, kept], held[:, kept])
        assert sum(prefill.sender.agent.stats.bytes_by_transport.values()) == 3 * 3 * 64

    with_pair(scenario)


def test_a_prompt_held_entirely_by_the_decode_node_needs_no_frame() -> None:
    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        decode.source.num_held_blocks = 8
        await complete(prefill, decode, make_request(32))
        assert prefill.sender.agent.stats.frames == 0

    with_pair(scenario)


def test_many_hand_offs_at_once_share_the_slots_and_all_arrive() -> None:
    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        requests = [make_request(4) for _ in range(24)]
        for block, request in enumerate(requests):
            prefill.hand_off(decode, request)
            prefill.sender.chunk_computed(request.sequence_id, 4, [block], None)
            prefill.sender.commit(request.sequence_id, block)
        await until(lambda: prefill.sender.num_transfers == 0)
        for block, request in enumerate(requests):
            [taken] = decode.source.owned[request.sequence_id]
            assert torch.equal(decode.pool[:, taken], prefill.pool[:, block])

    with_pair(scenario)


def test_a_refusal_reaches_the_node_typed_and_the_next_hand_off_works() -> None:
    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        decode.source.refusal = Overloaded("The decode node is full.")
        request = make_request(30)
        prefill.hand_off(decode, request)
        prefill.compute(request, TABLE)
        await until(lambda: prefill.owner.of(request.sequence_id) == ["failed", "free"])
        assert isinstance(prefill.owner.errors[request.sequence_id], Overloaded)
        decode.source.refusal = None
        await complete(prefill, decode, make_request(30))

    with_pair(scenario)


@pytest.mark.parametrize("moment", ["before the pair", "waiting", "ticketed", "sent"])
def test_a_withdrawn_hand_off_frees_both_sides_and_reports_no_failure(moment: str) -> None:
    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        request = make_request(30)
        name = request.sequence_id
        if moment == "waiting":
            decode.source.may_reserve.clear()
        prefill.hand_off(decode, request)
        if moment == "waiting":
            await until(lambda: decode.receiver.num_transfers == 1)
        if moment in ("ticketed", "sent"):
            await until(lambda: decode.source.of(name) == ["reserved"])
        if moment == "sent":
            prefill.compute(request, TABLE)
            await until(lambda: decode.receiver.agent.stats.frames == 1)
        prefill.sender.abort(name, finished=moment == "sent")
        await until(lambda: prefill.owner.of(name) == ["free"])
        await until(lambda: decode.receiver.num_transfers == 0)
        assert name not in decode.source.owned
        assert "failed" not in decode.source.of(name)
        decode.source.may_reserve.set()
        await complete(prefill, decode, make_request(30))

    with_pair(scenario)


def test_a_cancel_at_the_decode_node_ends_the_hand_off_on_both_sides() -> None:
    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        request = make_request(30)
        name = request.sequence_id
        prefill.hand_off(decode, request)
        prefill.sender.chunk_computed(name, 13, TABLE, None)
        await until(lambda: decode.receiver.agent.stats.frames == 1)
        decode.receiver.cancel(name)
        await until(lambda: prefill.owner.of(name) == ["failed", "free"])
        assert prefill.owner.errors[name].code == "cancelled"
        await until(lambda: name not in decode.source.owned)
        await complete(prefill, decode, make_request(30))
        for side in (prefill.sender, decode.receiver):  # clients leave: that is no trouble
            assert not side.agent.stats.failures

    with_pair(scenario)


def test_a_lease_that_the_decode_node_does_not_renew_ends_the_hand_off() -> None:
    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        request = make_request(30)
        name = request.sequence_id
        prefill.hand_off(decode, request)
        await until(lambda: decode.source.of(name) == ["reserved"])
        prefill.clock.advance(30.0)
        prefill.sender.sweep()
        assert prefill.owner.of(name) == ["failed", "free"]
        assert prefill.owner.errors[name].reason == "lease_expired"
        await until(lambda: name not in decode.source.owned)

    with_pair(scenario)


def test_an_expired_lease_is_noticed_before_a_frame_is_posted_even_without_a_sweep() -> None:
    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        request = make_request(30)
        name = request.sequence_id
        prefill.hand_off(decode, request)
        await until(lambda: decode.source.of(name) == ["reserved"])
        prefill.sender._sweeping.cancel()  # type: ignore[union-attr]
        prefill.clock.advance(31.0)
        prefill.compute(request, TABLE)
        await until(lambda: prefill.owner.of(name) == ["failed", "free"])
        assert decode.receiver.agent.stats.frames == 0

    with_pair(scenario)


def test_leases_renewed_by_both_sides_live_as_long_as_the_prompt_takes() -> None:
    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        request = make_request(30)
        name = request.sequence_id
        prefill.hand_off(decode, request)
        await until(lambda: decode.source.of(name) == ["reserved"])
        for _ in range(20):
            prefill.clock.advance(6.0)
            decode.clock.advance(6.0)
            prefill.sender.sweep()
            decode.receiver.sweep()
            await until(lambda: prefill.sender.leases()[0].expires_in_seconds > 15.0)
            await until(lambda: decode.receiver.leases()[0].expires_in_seconds > 15.0)
        prefill.compute(request, TABLE)
        prefill.sender.commit(name, 1)
        await until(lambda: prefill.owner.of(name) == ["committed", "free"])

    with_pair(scenario)


def test_nodes_that_do_not_fit_refuse_each_other_and_serve_their_other_peers() -> None:
    async def main() -> None:
        network = LoopbackNetwork()
        other = Compatibility(1, "other layout")
        async with (
            prefill_side(LoopbackTransport(network)) as prefill,
            decode_side(LoopbackTransport(network), compatibility=other, name="odd") as odd,
            decode_side(LoopbackTransport(network), name="even") as even,
        ):
            request = make_request(30)
            prefill.hand_off(odd, request)
            await until(lambda: prefill.owner.of(request.sequence_id) == ["failed", "free"])
            error = prefill.owner.errors[request.sequence_id]
            assert isinstance(error, HandshakeMismatch)
            assert odd.receiver.agent.stats.handshakes_refused == 1
            assert odd.source.log == []
            await complete(prefill, even, make_request(30))

    asyncio.run(main())


def test_a_hand_off_meant_for_an_earlier_incarnation_is_not_given_to_this_one() -> None:
    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        old = replace(decode, node_id=NodeId(decode.node_id.name, Incarnation(12345)))
        request = make_request(30)
        prefill.hand_off(old, request)
        await until(lambda: prefill.owner.of(request.sequence_id) == ["failed", "free"])
        assert prefill.owner.errors[request.sequence_id].reason == "decode_lost"
        assert decode.source.log == []
        await complete(prefill, decode, make_request(30))

    with_pair(scenario)


def test_a_hand_off_meant_for_an_earlier_incarnation_costs_those_to_this_one_nothing() -> None:
    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        request, late = make_request(30), make_request(30)
        name = request.sequence_id
        prefill.hand_off(decode, request)
        await until(lambda: decode.source.of(name) == ["reserved"])
        prefill.hand_off(replace(decode, node_id=NodeId(decode.node_id.name, Incarnation(1))), late)
        await until(lambda: prefill.owner.of(late.sequence_id) == ["failed", "free"])
        assert prefill.owner.errors[late.sequence_id].reason == "decode_lost"
        prefill.compute(request, TABLE)
        prefill.sender.commit(name, 7)
        await until(lambda: "free" in prefill.owner.of(name))
        assert prefill.owner.of(name) == ["committed", "free"]

    with_pair(scenario)


def test_an_unreachable_decode_node_fails_only_its_own_hand_offs() -> None:
    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        nowhere = replace(
            decode,
            address="127.0.0.1:9",
            node_id=NodeId(decode.node_id.name, Incarnation(12345)),
        )
        request = make_request(30)
        prefill.hand_off(nowhere, request)
        await complete(prefill, decode, make_request(30))
        await until(lambda: prefill.owner.of(request.sequence_id) == ["failed", "free"])
        assert prefill.owner.errors[request.sequence_id].retryable

    with_pair(scenario, pairing_seconds=1.0)


def test_the_loss_of_the_decode_node_ends_its_hand_offs_and_a_new_one_pairs_anew() -> None:
    async def main() -> None:
        network = LoopbackNetwork()
        async with prefill_side(LoopbackTransport(network)) as prefill:
            request = make_request(30)
            name = request.sequence_id
            async with decode_side(LoopbackTransport(network), name="d") as first:
                prefill.hand_off(first, request)
                prefill.sender.chunk_computed(name, 13, TABLE, None)
                await until(lambda: first.receiver.agent.stats.frames == 1)
            await until(lambda: prefill.owner.of(name) == ["failed", "free"])
            assert prefill.owner.errors[name].reason == "decode_lost"
            async with decode_side(LoopbackTransport(network), name="d") as second:
                await complete(prefill, second, make_request(30))

    asyncio.run(main())


def test_a_connection_of_a_kind_the_operator_refuses_is_not_used() -> None:
    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        request = make_request(30)
        prefill.hand_off(decode, request)
        await until(lambda: prefill.owner.of(request.sequence_id) == ["failed", "free"])
        assert prefill.owner.errors[request.sequence_id].retryable
        assert decode.source.log == []

    with_pair(scenario, require_transport="nvlink")


def test_leases_list_what_is_under_way() -> None:
    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        request = make_request(30)
        handoff = prefill.hand_off(decode, request)
        await until(lambda: decode.source.of(request.sequence_id) == ["reserved"])
        for [lease], peer in (
            (prefill.sender.leases(), "d0"),
            (decode.receiver.leases(), "p0"),
        ):
            assert lease.transfer_id == handoff.transfer_id
            assert (lease.peer, lease.num_blocks) == (peer, 8)
            assert 0 < lease.expires_in_seconds <= 30
        prefill.sender.abort(request.sequence_id)

    with_pair(scenario)


def test_a_sender_that_closes_waits_for_a_pairing_that_was_lost_and_still_reads() -> None:
    """Whoever closes it takes the blocks away then."""

    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        gate, pool = Gate(), prefill.sender.agent.pool
        pool.begin_gather = gate.around(pool.begin_gather)  # type: ignore[method-assign]
        request = make_request(32)
        prefill.hand_off(decode, request)
        prefill.compute(request, TABLE)
        await until(lambda: bool(gate.begun))
        [peer] = prefill.sender._peers.values()
        peer.cut()
        await until(lambda: prefill.owner.of(request.sequence_id) == ["failed"])
        closing = asyncio.create_task(prefill.sender.close())
        for _ in range(10):
            await asyncio.sleep(0)
        assert not closing.done()
        gate.opened.set()
        await closing
        assert prefill.owner.of(request.sequence_id) == ["failed", "free"]

    with_pair(scenario)


def test_a_pairing_that_is_lost_while_another_one_closes_ends_as_well() -> None:
    """What ends it already is not cut short: nobody else gives its sources and slots back."""

    async def scenario(prefill: PrefillSide, nodes: tuple[DecodeSide, DecodeSide]) -> None:
        pool, gates, names = prefill.sender.agent.pool, (Gate(), Gate()), []
        begin_gather = pool.begin_gather
        for decode, gate in zip(nodes, gates, strict=True):
            pool.begin_gather = gate.around(begin_gather)  # type: ignore[method-assign]
            request = make_request(8)
            names.append(request.sequence_id)
            prefill.hand_off(decode, request)
            prefill.compute(request, TABLE)
            await until(lambda: bool(gate.begun))  # noqa: B023 - waited for at once
        lost = list(prefill.sender._peers.values())[1]
        closing = asyncio.create_task(prefill.sender.close())
        await until(lambda: prefill.owner.of(names[0]) == ["failed"])
        lost.cut()
        await until(lambda: prefill.owner.of(names[1]) == ["failed"])
        gates[0].opened.set()
        await until(lambda: prefill.owner.of(names[0]) == ["failed", "free"])
        for _ in range(100):
            await asyncio.sleep(0)
        gates[1].opened.set()
        await closing
        assert prefill.owner.of(names[1]) == ["failed", "free"]

    async def main() -> None:
        network = LoopbackNetwork()
        async with (
            decode_side(LoopbackTransport(network)) as decode,
            decode_side(LoopbackTransport(network), name="d1") as other,
            prefill_side(LoopbackTransport(network)) as prefill,
        ):
            await scenario(prefill, (decode, other))

    asyncio.run(main())


def test_a_hand_off_that_was_opened_just_before_its_sender_closes_ends_as_well() -> None:
    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        request = make_request(8)
        prefill.hand_off(decode, request)
        await prefill.sender.close()
        assert prefill.owner.of(request.sequence_id) == ["failed", "free"]

    with_pair(scenario)
