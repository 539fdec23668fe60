"""What the receiving side does with peers and links that break, lie, repeat or go silent."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from cluster.errors import InvalidRequest, Overloaded
from cluster.node import NodeId, NodeName, new_incarnation
from cluster.proto import node_pb2 as pb
from cluster.rpc import open_channel
from kv_transfer.sending.kv_session import KvSessionStream
from kv_transfer.transports.loopback import LoopbackNetwork, LoopbackTransport
from tests.kv_faults import HandDriven, TamperingTransport, hand_driven, two_frames
from tests.kv_transfer.catalogue_worlds import with_peer
from tests.kv_twins import (
    BLOCK_SIZE,
    COMPATIBLE,
    DecodeSide,
    decode_side,
    make_pool,
    make_request,
    prefill_side,
    until,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable


def test_a_hand_driven_peer_that_keeps_the_rules_is_committed() -> None:
    async def scenario(peer: HandDriven, decode: DecodeSide) -> None:
        request = make_request(2 * BLOCK_SIZE)
        ticket, frames = await two_frames(peer, request)
        for header, payload in frames:
            await peer.post(header, payload)
        peer.commit(ticket, num_frames=2)
        committed = (await peer.next("committed")).committed
        assert not committed.HasField("error")
        taken = list(decode.source.owned[request.sequence_id])
        assert torch.equal(decode.pool[:, taken], peer.pool[:, [10, 11]])

    with_peer(scenario)


def test_a_commit_that_overtakes_its_frames_waits_for_them() -> None:
    async def scenario(peer: HandDriven, decode: DecodeSide) -> None:
        request = make_request(2 * BLOCK_SIZE)
        ticket, frames = await two_frames(peer, request)
        peer.commit(ticket, num_frames=2)
        await peer.post(*frames[0])
        assert decode.source.of(request.sequence_id) == ["reserved"]
        await peer.post(*frames[1])
        await peer.next("committed")
        assert decode.source.of(request.sequence_id) == ["reserved", "started"]

    with_peer(scenario)


def test_a_repeated_commit_is_answered_again_and_starts_once() -> None:
    async def scenario(peer: HandDriven, decode: DecodeSide) -> None:
        request = make_request(2 * BLOCK_SIZE)
        ticket, frames = await two_frames(peer, request)
        for header, payload in frames:
            await peer.post(header, payload)
        for _ in range(2):
            peer.commit(ticket, num_frames=2)
            assert not (await peer.next("committed")).committed.HasField("error")
        assert decode.source.of(request.sequence_id).count("started") == 1

    with_peer(scenario)


def test_one_flipped_byte_fails_the_transfer_counts_against_the_peer_and_starts_nothing() -> None:
    async def scenario(peer: HandDriven, decode: DecodeSide) -> None:
        request = make_request(2 * BLOCK_SIZE)
        name = request.sequence_id
        before = decode.pool.clone()
        _, frames = await two_frames(peer, request)
        header, payload = frames[0]
        payload[17] ^= 1
        await peer.post(header, payload)
        abort = (await peer.next("abort")).abort
        assert abort.error.reason == "digest_mismatch"
        assert decode.source.of(name) == ["reserved", "failed"]
        peer.acknowledge(abort, num_frames_posted=1)
        await until(lambda: decode.source.of(name)[-1] == "released")
        assert torch.equal(decode.pool, before)
        stats = decode.receiver.agent.stats
        assert stats.corrupt_frames_by_peer["p0"] == 1
        assert stats.failures["digest_mismatch", "fail"] == 1

    with_peer(scenario)


def test_a_right_block_in_the_wrong_place_or_of_another_tenant_is_a_digest_mismatch() -> None:
    async def scenario(peer: HandDriven, decode: DecodeSide) -> None:
        for salt, shift in ((b"", 1), (b"other tenant", 0)):
            peer.reserve(make_request(2 * BLOCK_SIZE))
            ticket = await peer.ticket()
            header, payload = await peer.header(ticket, 0, {0: 10}, salt=salt)
            await peer.post(replace(header, positions=(header.positions[0] + shift,)), payload)
            abort = (await peer.next("abort")).abort
            assert abort.error.reason == "digest_mismatch"
            peer.acknowledge(abort, num_frames_posted=1)

    with_peer(scenario)


@pytest.mark.parametrize("field", ["incarnation", "epoch", "transfer_id"])
def test_a_frame_of_another_ticket_is_dropped_counted_and_harmless(field: str) -> None:
    async def scenario(peer: HandDriven, decode: DecodeSide) -> None:
        ticket, frames = await two_frames(peer, make_request(2 * BLOCK_SIZE))
        wrong: Any = bytes(16) if field == "transfer_id" else 1
        await peer.post(replace(frames[0][0], **{field: wrong}), frames[0][1])
        for header, payload in frames:
            await peer.post(header, payload)
        peer.commit(ticket, num_frames=2)
        assert not (await peer.next("committed")).committed.HasField("error")
        assert sum(decode.receiver.agent.stats.frames_dropped.values()) == 1

    with_peer(scenario)


def test_a_repeated_frame_is_dropped_and_a_late_one_after_the_end_too() -> None:
    async def scenario(peer: HandDriven, decode: DecodeSide) -> None:
        request = make_request(2 * BLOCK_SIZE)
        ticket, frames = await two_frames(peer, request)
        for header, payload in (frames[0], frames[0], frames[1]):
            await peer.post(header, payload)
        peer.commit(ticket, num_frames=2)
        await peer.next("committed")
        after = decode.pool.clone()
        late = frames[0][1] ^ 255
        await peer.post(frames[0][0], late)
        await until(lambda: sum(decode.receiver.agent.stats.frames_dropped.values()) == 2)
        assert torch.equal(decode.pool, after)

    with_peer(scenario)


def test_an_aborted_transfer_keeps_its_blocks_until_every_posted_frame_has_been_drained() -> None:
    async def scenario(peer: HandDriven, decode: DecodeSide) -> None:
        request = make_request(2 * BLOCK_SIZE)
        name = request.sequence_id
        _, frames = await two_frames(peer, request)
        await peer.post(*frames[0])
        decode.receiver.cancel(name)
        abort = (await peer.next("abort")).abort
        assert decode.receiver.num_quarantined_blocks == 2
        peer.acknowledge(abort, num_frames_posted=2)
        await peer.post_header(frames[1][0])
        assert name in decode.source.owned
        before = decode.pool.clone()
        await peer.endpoint.send(frames[1][1], frames[1][0].nonce)
        await until(lambda: name not in decode.source.owned)
        assert torch.equal(decode.pool, before)

    with_peer(scenario)


def test_a_payload_that_was_awaited_when_the_transfer_was_aborted_is_not_scattered() -> None:
    async def scenario(peer: HandDriven, decode: DecodeSide) -> None:
        request = make_request(2 * BLOCK_SIZE)
        name = request.sequence_id
        _, frames = await two_frames(peer, request)
        await peer.post_header(frames[0][0])
        await until(lambda: decode.receiver.agent.staging.num_free == 3)  # a slot waits for it
        decode.receiver.cancel(name)
        abort = (await peer.next("abort")).abort
        before = decode.pool.clone()
        await peer.endpoint.send(frames[0][1], frames[0][0].nonce)
        peer.acknowledge(abort, num_frames_posted=1)
        await until(lambda: name not in decode.source.owned)
        assert torch.equal(decode.pool, before)

    with_peer(scenario)


def test_a_peer_that_never_acknowledges_is_cut_off_and_only_then_are_its_blocks_freed() -> None:
    async def scenario(peer: HandDriven, decode: DecodeSide) -> None:
        request = make_request(2 * BLOCK_SIZE)
        name = request.sequence_id
        _, frames = await two_frames(peer, request)
        await peer.post_header(frames[0][0])  # its payload never comes
        await until(lambda: decode.receiver.agent.staging.num_free == 3)
        decode.receiver.cancel(name)
        decode.clock.advance(0.9)
        decode.receiver.sweep()
        assert name in decode.source.owned
        decode.clock.advance(0.2)
        decode.receiver.sweep()
        await until(lambda: name not in decode.source.owned)
        await until(lambda: peer.is_ended)
        with pytest.raises(Exception, match="connection"):
            await peer.endpoint.send(frames[0][1], frames[0][0].nonce)
        assert decode.receiver.num_sessions == 0

    with_peer(scenario)


def test_the_loss_of_a_peer_ends_its_transfers_and_no_other() -> None:
    async def main() -> None:
        network = LoopbackNetwork()
        async with AsyncExitStack() as stack:
            decode = await stack.enter_async_context(decode_side(LoopbackTransport(network)))
            other = await stack.enter_async_context(
                hand_driven(network, decode, make_pool(1), name="p1")
            )
            kept = make_request(2 * BLOCK_SIZE)
            ticket, frames = await two_frames(other, kept)
            lost = make_request(2 * BLOCK_SIZE)
            async with hand_driven(network, decode, make_pool(1), name="p0") as peer:
                _, lost_frames = await two_frames(peer, lost)
                await peer.post(*lost_frames[0])
            await until(lambda: lost.sequence_id not in decode.source.owned)
            assert decode.source.errors[lost.sequence_id].retryable
            for header, payload in frames:
                await other.post(header, payload)
            other.commit(ticket, num_frames=2)
            await other.next("committed")
            assert list(decode.source.errors) == [lost.sequence_id]

    asyncio.run(main())


def test_a_restarted_peer_of_the_same_name_replaces_its_old_session() -> None:
    async def main() -> None:
        network = LoopbackNetwork()
        async with (
            decode_side(LoopbackTransport(network)) as decode,
            hand_driven(network, decode, make_pool(1)) as old,
        ):
            request = make_request(2 * BLOCK_SIZE)
            await two_frames(old, request)
            async with hand_driven(network, decode, make_pool(1)) as new:
                await until(lambda: request.sequence_id not in decode.source.owned)
                await until(lambda: old.is_ended)
                ticket, frames = await two_frames(new, make_request(2 * BLOCK_SIZE))
                for header, payload in frames:
                    await new.post(header, payload)
                new.commit(ticket, num_frames=2)
                await new.next("committed")

    asyncio.run(main())


def test_a_header_that_cannot_be_read_cuts_the_link_and_frees_the_blocks() -> None:
    async def scenario(peer: HandDriven, decode: DecodeSide) -> None:
        request = make_request(2 * BLOCK_SIZE)
        name = request.sequence_id
        await two_frames(peer, request)
        await peer.endpoint.send(torch.zeros(100, dtype=torch.uint8), peer.session_id)
        await until(lambda: name not in decode.source.owned)
        assert decode.source.errors[name].reason == "frame_malformed"
        await until(lambda: peer.is_ended)

    with_peer(scenario)


def test_a_payload_longer_than_its_header_says_fails_the_transfer() -> None:
    async def scenario(peer: HandDriven, decode: DecodeSide) -> None:
        request = make_request(2 * BLOCK_SIZE)
        _, frames = await two_frames(peer, request)
        longer = torch.cat([frames[0][1], frames[0][1]])
        await peer.post(frames[0][0], longer)
        abort = (await peer.next("abort")).abort
        peer.acknowledge(abort, num_frames_posted=1)
        await until(lambda: request.sequence_id not in decode.source.owned)

    with_peer(scenario)


def test_a_data_connection_that_names_no_session_is_closed() -> None:
    async def scenario(peer: HandDriven, decode: DecodeSide) -> None:
        intruder = LoopbackTransport(decode.receiver.agent.transport._network)  # type: ignore[attr-defined]
        for session_id in (peer.session_id ^ 1, peer.session_id):
            endpoint = await intruder.connect("", decode.receiver.data_port, session_id)
            closed = asyncio.Event()
            endpoint.on_close(closed.set)
            await asyncio.wait_for(closed.wait(), 5)
        assert decode.receiver.num_sessions == 1

    with_peer(scenario)


@pytest.mark.parametrize("is_late", [False, True], ids=["at once", "later"])
def test_a_start_that_fails_is_told_to_both_sides_and_frees_the_blocks(is_late: bool) -> None:
    async def scenario(peer: HandDriven, decode: DecodeSide) -> None:
        async def refuse_later() -> None:
            raise Overloaded("The engine is full.")

        def refuse(sequence_id: str, first_token_id: int) -> Awaitable[None]:
            if is_late:
                return refuse_later()
            raise Overloaded("The engine is full.")

        decode.source.start = refuse  # type: ignore[assignment, method-assign]
        request = make_request(2 * BLOCK_SIZE)
        ticket, frames = await two_frames(peer, request)
        for header, payload in frames:
            await peer.post(header, payload)
        peer.commit(ticket, num_frames=2)
        committed = (await peer.next("committed")).committed
        assert committed.error.code == "overloaded"
        assert decode.source.of(request.sequence_id) == ["reserved", "failed", "released"]

    with_peer(scenario)


def test_a_peer_lost_while_its_prompt_waits_for_blocks_leaves_the_queue() -> None:
    async def scenario(peer: HandDriven, decode: DecodeSide) -> None:
        decode.source.may_reserve.clear()
        peer.reserve(make_request(2 * BLOCK_SIZE))
        await until(lambda: decode.receiver.num_transfers == 1)
        await peer.stream.close()
        await until(lambda: decode.receiver.num_transfers == 0)
        assert [what for what, _ in decode.source.log] == ["failed"]

    with_peer(scenario)


def test_a_second_attempt_waits_until_the_first_is_freed_and_then_succeeds() -> None:
    async def scenario(peer: HandDriven, decode: DecodeSide) -> None:
        request = make_request(2 * BLOCK_SIZE)
        _, frames = await two_frames(peer, request)
        await peer.post(*frames[0])
        peer.reserve(request, attempt=2)
        abort = (await peer.next("abort")).abort
        assert decode.source.of(request.sequence_id) == ["reserved", "withdrawn"]
        peer.acknowledge(abort, num_frames_posted=1)
        ticket = await peer.ticket()
        for seq in range(2):
            await peer.post(*await peer.header(ticket, seq, {seq: 10 + seq}))
        peer.commit(ticket, num_frames=2)
        await peer.next("committed")
        log = decode.source.of(request.sequence_id)
        assert log == ["reserved", "withdrawn", "released", "reserved", "started"]

    with_peer(scenario)


@pytest.mark.parametrize("name", ["", "p" * 10_000, "p0\nand a line of its own"])
def test_a_peer_whose_name_cannot_be_one_is_refused(name: str) -> None:
    async def main() -> None:
        async with decode_side(LoopbackTransport(LoopbackNetwork())) as decode:
            channel = open_channel(decode.address)
            with pytest.raises(InvalidRequest):
                await KvSessionStream.open(
                    channel,
                    node_id=NodeId(NodeName(name), new_incarnation()),
                    ours=COMPATIBLE,
                    expected=decode.node_id,
                )
            assert decode.receiver.num_sessions == 0
            await channel.close()

    asyncio.run(main())


def test_a_message_that_breaks_the_protocol_ends_that_session_only() -> None:
    async def scenario(peer: HandDriven, decode: DecodeSide) -> None:
        request = make_request(2 * BLOCK_SIZE)
        await two_frames(peer, request)
        peer.stream.send(pb.SenderFrame(hello=pb.SenderHello(name="again")))
        await until(lambda: peer.is_ended)
        await until(lambda: request.sequence_id not in decode.source.owned)

    with_peer(scenario)


def test_a_reserve_that_does_not_decode_is_refused_and_the_session_goes_on() -> None:
    async def scenario(peer: HandDriven, decode: DecodeSide) -> None:
        peer.stream.send(pb.SenderFrame(reserve=pb.Reserve(transfer_id=bytes(16))))
        refused = (await peer.next("refused")).refused
        assert refused.error.code == "invalid_value"
        peer.reserve(make_request(BLOCK_SIZE))
        await peer.ticket()

    with_peer(scenario)


def test_a_link_that_flips_bits_fails_that_hand_off_typed_on_both_sides() -> None:
    async def main() -> None:
        network = LoopbackNetwork()
        tampered: list[int] = []

        def flip(message: torch.Tensor, tag: int) -> None:
            if message.numel() == 3 * 8 * (64 + 8) and not tampered:  # the payload
                message[1000] ^= 4
                tampered.append(tag)

        async with (
            decode_side(LoopbackTransport(network)) as decode,
            prefill_side(TamperingTransport(network, flip)) as prefill,
        ):
            for expected in (["failed", "free"], ["committed", "free"]):
                request = make_request(32)
                prefill.hand_off(decode, request)
                prefill.compute(request, list(range(8)))
                prefill.sender.commit(request.sequence_id, 1)
                name = request.sequence_id
                await until(lambda: prefill.sender.num_transfers == 0)
                assert prefill.owner.of(name) == expected
            assert tampered
            [error] = prefill.owner.errors.values()
            assert error.reason == "digest_mismatch"

    asyncio.run(main())


def test_moves_know_whether_anything_is_decoded_beside_them() -> None:
    async def scenario() -> None:
        is_decoding = False
        transport = LoopbackTransport(LoopbackNetwork())
        async with decode_side(transport, is_decoding=lambda: is_decoding) as decode:
            assert not decode.receiver.agent.pool.is_decoding()
            is_decoding = True
            assert decode.receiver.agent.pool.is_decoding()

    asyncio.run(scenario())
