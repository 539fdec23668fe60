"""Payloads that the receiver reads from the sender's slots. Here both are in one process, which
"maps" them by sharing the tensor; the GPU tests map them for real."""

from __future__ import annotations

import asyncio
import gc
import json
import weakref
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kv_transfer.failures import FailureReason, failure
from kv_transfer.handshake import Compatibility
from kv_transfer.mapped_slots import map_slots
from kv_transfer.protocol import SLOT_READ_BYTES, SlotName, pack_slot_read
from kv_transfer.transports.local_messages import LocalMessages, connect
from kv_transfer.transports.loopback import LoopbackEndpoint, LoopbackNetwork, LoopbackTransport
from tests.kv_transfer.catalogue_worlds import TABLE, Gate
from tests.kv_twins import (
    NUM_BLOCKS,
    DecodeSide,
    PrefillSide,
    decode_side,
    make_request,
    prefill_side,
    until,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from cluster.request import SequenceRequest
    from kv_transfer.frame_place import FramePlace

    Scenario = Callable[["World"], Awaitable[None]]


class World:
    def __init__(self, prefill: PrefillSide, decode: DecodeSide) -> None:
        self.prefill, self.decode = prefill, decode
        self.sent: list[int] = []  # by the endpoints, in bytes
        self.messages: list[int] = []  # of both directions, their bytes
        self.staging = prefill.sender.agent.staging

    def hand_off(self, *, commits: bool = True) -> SequenceRequest:
        request = make_request(32)
        self.prefill.hand_off(self.decode, request)
        self.prefill.compute(request, TABLE)
        if commits:
            self.prefill.sender.commit(request.sequence_id, 7)
        return request

    async def ended(self, request: SequenceRequest) -> list[str]:
        await until(lambda: "free" in self.prefill.owner.of(request.sequence_id))
        return self.prefill.owner.of(request.sequence_id)


@asynccontextmanager
async def world(
    monkeypatch: pytest.MonkeyPatch,
    *,
    is_decoding: Callable[[], bool] = lambda: False,
    **options: Any,
) -> AsyncIterator[World]:
    network = LoopbackNetwork()
    async with (
        decode_side(LoopbackTransport(network), is_decoding=is_decoding, **options) as decode,
        prefill_side(LoopbackTransport(network), **options) as prefill,
    ):
        here = World(prefill, decode)
        slots = tuple(here.staging._memory)
        here.staging._description = b"the slots of this process"
        agent = decode.receiver.agent
        monkeypatch.setattr(agent, "map_slots", lambda said: slots if said else ())
        name = property(lambda _: "cuda_ipc")
        monkeypatch.setattr(LoopbackEndpoint, "transport_name", name)
        send, send_message = LoopbackEndpoint.send, LocalMessages.send

        def counted(endpoint: LoopbackEndpoint, buffer: torch.Tensor, tag: int) -> Any:
            here.sent.append(buffer.numel())
            return send(endpoint, buffer, tag)

        def counted_message(messages: LocalMessages, message: bytes) -> None:
            here.messages.append(len(message))
            send_message(messages, message)

        monkeypatch.setattr(LoopbackEndpoint, "send", counted)
        monkeypatch.setattr(LocalMessages, "send", counted_message)
        yield here


def run(monkeypatch: pytest.MonkeyPatch, scenario: Scenario, **options: Any) -> None:
    async def main() -> None:
        async with world(monkeypatch, **options) as here:
            await scenario(here)

    asyncio.run(main())


def test_blocks_arrive_and_no_payload_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(here: World) -> None:
        for _ in range(3):
            request = here.hand_off()
            assert await here.ended(request) == ["committed", "free"]
            taken = list(here.decode.source.owned[request.sequence_id])
            assert torch.equal(here.decode.pool[:, taken], here.prefill.pool[:, TABLE])
            here.decode.source.free.extend(here.decode.source.owned.pop(request.sequence_id))
        assert here.sent == []
        assert max(here.messages) < 256, "headers, commits, and what was read"
        assert here.staging.num_free == here.staging.num_slots
        receiver_slots = here.decode.receiver.agent.staging
        assert receiver_slots.num_free == receiver_slots.num_slots

    run(monkeypatch, scenario)


def test_more_frames_than_slots_follow_as_slots_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(here: World) -> None:
        request = here.hand_off()
        assert await here.ended(request) == ["committed", "free"]
        assert here.prefill.sender.agent.stats.frames == 3 * 8

    run(monkeypatch, scenario, unit_bytes=4096)


def test_the_first_frame_is_small_and_each_next_one_twice_as_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(here: World) -> None:
        sizes: list[int] = []
        pool = here.prefill.sender.agent.pool
        gather = pool.begin_gather

        def counted(slot: torch.Tensor, frame: FramePlace, **options: Any) -> Any:
            sizes.append(frame.num_units)
            return gather(slot, frame, **options)

        monkeypatch.setattr(pool, "begin_gather", counted)
        monkeypatch.setattr("kv_transfer.sending.shipping.FIRST_FRAME_BYTES", 8 * 64)
        for _ in range(2):
            request = here.hand_off()
            assert await here.ended(request) == ["committed", "free"]
            assert sizes == [8, 16]
            sizes.clear()

    run(monkeypatch, scenario)


def test_a_slot_is_not_free_before_it_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(here: World) -> None:
        pool, gate = here.decode.receiver.agent.pool, Gate()
        monkeypatch.setattr(pool, "begin_scatter", gate.around(pool.begin_scatter))
        request = here.hand_off()
        await until(lambda: bool(gate.begun))
        assert here.staging.num_free == here.staging.num_slots - 1
        assert here.prefill.owner.of(request.sequence_id) == []
        gate.opened.set()
        assert await here.ended(request) == ["committed", "free"]
        await until(lambda: here.staging.num_free == here.staging.num_slots)

    run(monkeypatch, scenario)


@pytest.mark.parametrize("byte", [5, 3 * 8 * 64 + 3], ids=["of the units", "of their digests"])
def test_what_changed_in_a_slot_is_refused_on_both_ends(
    byte: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(here: World) -> None:
        send = LocalMessages.send

        def spoil(messages: LocalMessages, message: bytes) -> None:
            here.staging._memory[:, byte] ^= 4
            send(messages, message)

        monkeypatch.setattr(LocalMessages, "send", spoil)
        request = here.hand_off(commits=False)
        assert await here.ended(request) == ["failed", "free"]
        assert here.prefill.owner.errors[request.sequence_id].reason == "digest_mismatch"
        assert here.decode.source.errors[request.sequence_id].reason == "digest_mismatch"
        await until(lambda: len(here.decode.source.free) == NUM_BLOCKS)

    run(monkeypatch, scenario)


def test_a_frame_that_nobody_wants_gives_its_slot_back_unread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(here: World) -> None:
        receiver, request = here.decode.receiver, make_request(32)
        here.prefill.hand_off(here.decode, request)
        [sending] = here.prefill.sender._sendings
        await until(lambda: sending.machine.ticket is not None)
        before = here.decode.pool.clone()
        heard = here.prefill.sender.received
        monkeypatch.setattr(here.prefill.sender, "received", lambda *_: None)
        receiver.cancel(request.sequence_id)  # the sender does not hear of it yet
        await until(lambda: "withdrawn" in here.decode.source.of(request.sequence_id))
        monkeypatch.setattr(here.prefill.sender, "received", heard)
        here.prefill.compute(request, TABLE)
        await until(lambda: sum(receiver.agent.stats.frames_dropped.values()) == 1)
        await until(lambda: here.staging.num_free == here.staging.num_slots)
        assert torch.equal(here.decode.pool, before)
        here.prefill.sender.abort(request.sequence_id)
        assert "free" in await here.ended(request)

    run(monkeypatch, scenario)


def test_sources_and_slots_are_free_when_the_link_ends_during_a_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(here: World) -> None:
        pool, gate = here.decode.receiver.agent.pool, Gate()
        monkeypatch.setattr(pool, "begin_scatter", gate.around(pool.begin_scatter))
        request = here.hand_off()
        await until(lambda: bool(gate.begun))
        [peer] = here.prefill.sender._peers.values()
        peer.cut()
        assert await here.ended(request) == ["failed", "free"]
        assert here.staging.num_free == here.staging.num_slots
        assert len(here.decode.source.free) < NUM_BLOCKS, "they are still written"
        gate.opened.set()
        await until(lambda: len(here.decode.source.free) == NUM_BLOCKS)

    run(monkeypatch, scenario)


def test_a_peer_whose_slot_is_read_after_the_link_has_ended_corrupts_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its slots are its own again: other frames stand there."""

    async def scenario(here: World) -> None:
        agent, may_read = here.decode.receiver.agent, asyncio.Event()
        begin, begun = agent.pool.begin_scatter, asyncio.Event()

        async def read_late(*frame: Any, **options: Any) -> bool:
            begun.set()
            await may_read.wait()
            return await begin(*frame, **options)

        monkeypatch.setattr(
            agent.pool, "begin_scatter", lambda *f, **o: asyncio.ensure_future(read_late(*f, **o))
        )
        request = here.hand_off()
        await begun.wait()
        [peer] = here.prefill.sender._peers.values()
        peer.cut()
        assert await here.ended(request) == ["failed", "free"]
        here.staging._memory.fill_(0)
        may_read.set()
        await until(lambda: len(here.decode.source.free) == NUM_BLOCKS)
        assert not agent.stats.corrupt_frames_by_peer

    run(monkeypatch, scenario)


def test_a_header_that_names_no_slot_of_ours_cuts_the_link(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(here: World) -> None:
        monkeypatch.setattr(
            "kv_transfer.sending.payloads.ReadPayload.read_from", SlotName(4, 0)
        )  # of four slots
        request = here.hand_off()
        assert await here.ended(request) == ["failed", "free"]
        await until(lambda: len(here.decode.source.free) == NUM_BLOCKS)
        assert here.decode.source.errors[request.sequence_id].reason == "frame_malformed"

    run(monkeypatch, scenario)


@pytest.mark.parametrize("names", ["another session", "one that has its messages"])
def test_who_connects_for_messages_without_being_a_sender_is_cut(
    names: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(here: World) -> None:
        assert await here.ended(here.hand_off()) == ["committed", "free"]
        receiver = here.decode.receiver
        [session] = receiver._sessions
        session_id = session.id if names == "one that has its messages" else session.id ^ 1
        stranger = await connect(receiver.messages_at, session_id, max_bytes=64)
        cut: list[bool] = []
        stranger.on_close(lambda: cut.append(True))
        stranger.listen(lambda _: None)
        await until(lambda: bool(cut))
        assert await here.ended(here.hand_off()) == ["committed", "free"]

    run(monkeypatch, scenario)


@pytest.mark.parametrize("end", ["sender", "receiver"])
def test_the_loss_of_the_messages_alone_ends_the_pairing(
    end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(here: World) -> None:
        request = here.hand_off(commits=False)
        await until(lambda: here.decode.receiver.agent.stats.frames == 1)
        [peer] = here.prefill.sender._peers.values()
        [session] = here.decode.receiver._sessions
        messages = peer._messages if end == "sender" else session._messages
        assert messages is not None
        messages.close()
        assert await here.ended(request) == ["failed", "free"]
        await until(lambda: len(here.decode.source.free) == NUM_BLOCKS)
        assert here.staging.num_free == here.staging.num_slots

    run(monkeypatch, scenario)


def test_a_header_by_messages_must_name_a_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(here: World) -> None:
        monkeypatch.setattr("kv_transfer.sending.payloads.ReadPayload.read_from", None)
        request = here.hand_off()
        assert await here.ended(request) == ["failed", "free"]
        await until(lambda: len(here.decode.source.free) == NUM_BLOCKS)
        assert here.decode.source.errors[request.sequence_id].reason == "frame_malformed"

    run(monkeypatch, scenario)


def test_a_header_by_the_transport_must_not(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(here: World) -> None:
        monkeypatch.setattr("kv_transfer.sending.payloads.SlotPayload.read_from", SlotName(0, 0))
        monkeypatch.setattr("kv_transfer.sending.peer.connect_messages", unreachable)
        request = here.hand_off()
        assert await here.ended(request) == ["failed", "free"]
        assert here.decode.source.errors[request.sequence_id].reason == "frame_malformed"

    run(monkeypatch, scenario)


async def unreachable(*_: object, **__: object) -> LocalMessages:
    raise failure(FailureReason.LINK_LOST)


def test_payloads_are_sent_where_the_socket_cannot_be_reached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(here: World) -> None:
        monkeypatch.setattr("kv_transfer.sending.peer.connect_messages", unreachable)
        request = here.hand_off()
        assert await here.ended(request) == ["committed", "free"]
        assert here.messages == []
        assert max(here.sent) > 256

    run(monkeypatch, scenario)


@pytest.mark.parametrize("message", [b"\0" * SLOT_READ_BYTES, pack_slot_read(SlotName(1, 99))])
def test_what_a_receiver_says_of_other_slots_frees_none(
    message: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise ends the link; a slot that nobody reads is nobody's."""

    async def scenario(here: World) -> None:
        monkeypatch.setattr("kv_transfer.receiving.slot_reader.pack_slot_read", lambda _: message)
        request = here.hand_off(commits=False)
        await until(lambda: here.decode.receiver.agent.stats.frames == 1)
        if message[0]:
            await asyncio.sleep(0)
            assert here.staging.num_free == here.staging.num_slots - 1
            here.prefill.sender.abort(request.sequence_id)
            [peer] = here.prefill.sender._peers.values()
            peer.cut()
        await here.ended(request)
        assert here.staging.num_free == here.staging.num_slots

    run(monkeypatch, scenario)


@pytest.mark.parametrize(
    "description",
    [b"", b"noise", b"{}", json.dumps({"slots": 3}).encode(), b"[" * 100_000, b"1"],
    ids=["none", "noise", "nothing in it", "of another form", "deep", "a number"],
)
def test_slots_that_cannot_be_mapped_are_sent_instead(description: bytes) -> None:
    assert map_slots(description, torch.device("cpu")) == ()


def test_a_slot_that_a_receiver_does_not_give_back_is_not_kept_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The KV is there, and the sequence runs: nothing else would end the wait."""

    async def scenario(here: World) -> None:
        given_back = iter([pack_slot_read(SlotName(1, 99))])
        monkeypatch.setattr(
            "kv_transfer.receiving.slot_reader.pack_slot_read",
            lambda name: next(given_back, None) or pack_slot_read(name),
        )
        request = here.hand_off()
        await until(lambda: here.prefill.owner.of(request.sequence_id) == ["committed"])
        here.prefill.clock.advance(61.0)
        assert await here.ended(request) == ["committed", "free"]
        assert here.staging.num_free == here.staging.num_slots

    run(monkeypatch, scenario, stall_seconds=60.0, lease_seconds=300.0)


def test_the_slots_of_a_peer_that_does_not_fit_are_not_mapped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(here: World) -> None:
        receiver, asked = here.decode.receiver, list[bytes]()
        monkeypatch.setattr(receiver.agent, "map_slots", asked.append)
        receiver._sessions._compatibility = Compatibility(1, "another layout")
        request = here.hand_off()
        assert await here.ended(request) == ["failed", "free"]
        assert asked == []

    run(monkeypatch, scenario)


def test_the_slots_of_a_peer_that_is_gone_are_not_kept_mapped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their memory is given back with the last mapping, not when a collector comes by."""

    async def scenario(here: World) -> None:
        mapped: list[weakref.ref[torch.Tensor]] = []

        def map_anew(_: bytes) -> tuple[torch.Tensor, ...]:
            slots = tuple(slot.view(-1) for slot in here.staging._memory)
            mapped.extend(weakref.ref(slot) for slot in slots)
            return slots

        receiver = here.decode.receiver
        monkeypatch.setattr(receiver.agent, "map_slots", map_anew)
        request = here.hand_off()
        assert await here.ended(request) == ["committed", "free"]
        gc.disable()
        try:
            [peer] = here.prefill.sender._peers.values()
            peer.cut()
            await until(lambda: receiver.num_sessions == 0)
            await until(lambda: all(slot() is None for slot in mapped))
        finally:
            gc.enable()

    run(monkeypatch, scenario)


@pytest.mark.parametrize("is_mapped", [True, False])
def test_behind_a_ticket_the_loop_stays_awake_where_slots_are_read(
    is_mapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short prompt's only frame finds it awake, though none came before."""

    async def scenario(here: World) -> None:
        stays: list[bool] = []
        receiver = here.decode.receiver
        monkeypatch.setattr(receiver._lookout, "stay", lambda: stays.append(True))
        if not is_mapped:
            monkeypatch.setattr(receiver.agent, "map_slots", lambda _: ())
        request = make_request(32)
        handoff = here.prefill.hand_off(here.decode, request)
        sending = here.prefill.sender._sendings[handoff.transfer_id]
        await until(lambda: sending.machine.ticket is not None)
        if is_mapped:
            await until(lambda: bool(stays))
        here.prefill.compute(request, TABLE)
        here.prefill.sender.commit(request.sequence_id, 7)
        assert await here.ended(request) == ["committed", "free"]
        assert bool(stays) is is_mapped

    run(monkeypatch, scenario)
