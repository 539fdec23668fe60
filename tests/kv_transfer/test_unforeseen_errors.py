"""Errors of the machine under a hand-off, where no protocol expects one: blocks, slots and timers
outlive them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
import torch

from cluster.errors import device_lost
from kv_transfer.receiving.arrivals import SlotArrival
from kv_transfer.receiving.receiver import KVReceiver
from kv_transfer.sending.outgoing import OutgoingTransfer
from kv_transfer.sending.payloads import SlotPayload
from kv_transfer.staging import Staging
from kv_transfer.transports.loopback import LoopbackEndpoint
from tests.kv_faults import HandDriven, two_frames
from tests.kv_transfer.catalogue_worlds import TABLE, with_pair, with_peer
from tests.kv_twins import (
    BLOCK_SIZE,
    NUM_BLOCKS,
    DecodeSide,
    PrefillSide,
    handoff_to,
    make_request,
    until,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.errors import ServingError


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("nobody foresaw this")


def test_blocks_come_back_when_there_is_no_memory_for_what_nobody_wants(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The scratch memory is allocated with the first frame that is dropped."""

    def full(_: Staging) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    async def scenario(peer: HandDriven, decode: DecodeSide) -> None:
        request = make_request(2 * BLOCK_SIZE)
        _, frames = await two_frames(peer, request)
        monkeypatch.setattr(Staging, "scratch", property(full))
        decode.receiver.cancel(request.sequence_id)
        peer.post(*frames[0])
        await until(lambda: peer.is_ended)
        await until(lambda: len(decode.source.free) == NUM_BLOCKS)

    with_peer(scenario)


def test_blocks_come_back_when_a_payload_cannot_be_received(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(peer: HandDriven, decode: DecodeSide) -> None:
        request = make_request(2 * BLOCK_SIZE)
        _, frames = await two_frames(peer, request)
        monkeypatch.setattr(SlotArrival, "receive", broken)
        peer.post(*frames[0])
        await until(lambda: len(decode.source.free) == NUM_BLOCKS)
        assert decode.source.errors[request.sequence_id].reason == "unknown"

    with_peer(scenario)


def test_blocks_that_could_not_be_prepared_for_are_received_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their transfer could never end: it would still be asking for them."""

    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        monkeypatch.setattr(decode.receiver.agent.pool, "prepare", broken)
        await handed_off(prefill, decode)

    with_pair(scenario)


@pytest.mark.parametrize("owner", [SlotPayload, LoopbackEndpoint], ids=["payload", "header"])
def test_sources_and_slots_come_back_when_a_frame_cannot_be_posted(
    owner: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        request = make_request(32)
        prefill.hand_off(decode, request)
        await until(lambda: decode.source.of(request.sequence_id) == ["reserved"])
        monkeypatch.setattr(owner, "send", broken)
        prefill.compute(request, TABLE)
        await until(lambda: prefill.owner.of(request.sequence_id) == ["failed", "free"])
        monkeypatch.undo()
        await until(lambda: len(decode.source.free) == NUM_BLOCKS)
        await handed_off(prefill, decode)

    with_pair(scenario)


@pytest.mark.parametrize("waits", [False, True], ids=["at once", "when there is a slot"])
def test_a_hand_off_whose_frames_cannot_be_planned_ends_and_the_next_ones_go_on(
    waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        request = make_request(32)
        prefill.hand_off(decode, request)
        await until(lambda: decode.source.of(request.sequence_id) == ["reserved"])
        monkeypatch.setattr(OutgoingTransfer, "next_frame", broken)
        staging = prefill.sender.agent.staging
        taken = [staging.take(other) for other in range(staging.num_slots if waits else 0)]
        prefill.compute(request, TABLE)
        await asyncio.sleep(0)
        for slot in taken:
            assert slot is not None
            staging.release(slot)
        await until(lambda: prefill.owner.of(request.sequence_id) == ["failed", "free"])
        monkeypatch.undo()
        await handed_off(prefill, decode)

    with_pair(scenario)


@pytest.mark.parametrize("callback", ["on_transfer_failed", "release"])
def test_a_node_that_breaks_when_it_is_told_of_one_transfer_is_told_of_the_others(
    callback: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(peer: HandDriven, decode: DecodeSide) -> None:
        first, second = make_request(2 * BLOCK_SIZE), make_request(2 * BLOCK_SIZE)
        for request in (first, second):
            peer.reserve(request)
            await peer.ticket()
        tell = getattr(decode.source, callback)

        def told(sequence_id: str, *rest: Any) -> None:
            broken() if sequence_id == first.sequence_id else tell(sequence_id, *rest)

        monkeypatch.setattr(decode.source, callback, told)
        await peer.stream.close()
        await until(lambda: "released" in decode.source.of(second.sequence_id))
        assert "failed" in decode.source.of(second.sequence_id)
        await until(lambda: decode.receiver.num_transfers == decode.receiver.num_sessions == 0)

    with_peer(scenario, gives_all_back=callback != "release")


@pytest.mark.parametrize("callback", ["on_committed", "on_failed", "on_sources_free"])
def test_a_node_that_breaks_over_the_end_of_one_hand_off_hears_of_the_others(
    callback: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And their pairing stands: what its node makes of a hand-off is no fault of the peer."""

    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        first, second, third = (make_request(2 * BLOCK_SIZE) for _ in range(3))
        requests = (first, second) if callback != "on_failed" else (first, second, third)
        tell = getattr(prefill.owner, callback)

        def told(sequence_id: str, *rest: Any) -> None:
            broken() if sequence_id == first.sequence_id else tell(sequence_id, *rest)

        monkeypatch.setattr(prefill.owner, callback, told)
        for request in requests:
            prefill.hand_off(decode, request)
        await until(lambda: len(decode.source.owned) == len(requests))
        if callback == "on_failed":
            for request in (first, second):
                decode.receiver.cancel(request.sequence_id)
            await until(lambda: "free" in prefill.owner.of(second.sequence_id))
            assert prefill.owner.of(second.sequence_id) == ["failed", "free"]
        for request in requests:
            prefill.compute(request, TABLE[:2])
            prefill.sender.commit(request.sequence_id, 7)
        last = requests[-1].sequence_id
        await until(lambda: prefill.owner.of(last) == ["committed", "free"])
        await until(lambda: prefill.sender.num_transfers == 0)
        assert prefill.sender.agent.stats.pairings == 1

    with_pair(scenario)


@pytest.mark.parametrize("errand", ["reserve", "start"])
def test_a_sender_hears_of_a_node_that_breaks_when_it_is_asked(
    errand: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for the answer, and so do the blocks at its end."""

    async def breaks(*_: Any) -> None:
        broken()

    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        monkeypatch.setattr(decode.source, errand, breaks)
        request = make_request(32)
        prefill.hand_off(decode, request)
        prefill.compute(request, TABLE)
        prefill.sender.commit(request.sequence_id, 7)
        await until(lambda: prefill.owner.of(request.sequence_id) == ["failed", "free"])
        await until(lambda: len(decode.source.free) == NUM_BLOCKS)
        monkeypatch.undo()
        await handed_off(prefill, decode)

    with_pair(scenario)


def test_a_frame_ends_and_its_slot_comes_back_whatever_its_end_sets_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The session could never be revoked, nor its blocks be freed."""
    ended = KVReceiver.frame_ended

    def ended_badly(self: KVReceiver, *frame: Any) -> None:
        ended(self, *frame)
        broken()

    async def scenario(peer: HandDriven, decode: DecodeSide) -> None:
        _, frames = await two_frames(peer, make_request(2 * BLOCK_SIZE))
        staging = decode.receiver.agent.staging
        monkeypatch.setattr(KVReceiver, "frame_ended", ended_badly)
        asyncio.get_running_loop().set_exception_handler(lambda *_: seen.set())
        seen = asyncio.Event()
        peer.post(*frames[0])
        await asyncio.wait_for(seen.wait(), 5)
        assert staging.num_free == staging.num_slots
        await peer.stream.close()
        await until(lambda: len(decode.source.free) == NUM_BLOCKS)

    with_peer(scenario)


def test_a_transfer_id_that_is_in_use_is_refused() -> None:
    """By whoever draws such ids: the hand-off that has it already must not lose its books."""

    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        handoff = handoff_to(decode)
        first = make_request(32)
        prefill.sender.open(first, handoff)
        with pytest.raises(ValueError, match="transfer"):
            prefill.sender.open(make_request(32), handoff)
        prefill.compute(first, TABLE)
        prefill.sender.commit(first.sequence_id, 7)
        await until(lambda: prefill.owner.of(first.sequence_id) == ["committed", "free"])

    with_pair(scenario)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_what_a_connection_that_cannot_be_cut_may_still_touch_is_counted(
    role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        request = make_request(32)
        prefill.hand_off(decode, request)
        await until(lambda: decode.source.of(request.sequence_id) == ["reserved"])
        agent = (prefill.sender if role == "prefill" else decode.receiver).agent
        kept: list[str] = []
        monkeypatch.setattr(agent.quarantine, "keep", lambda *, peer, **_: kept.append(peer))
        monkeypatch.setattr(LoopbackEndpoint, "close", broken)
        [peer] = prefill.sender._peers.values()
        peer.cut()
        await until(lambda: bool(kept))
        monkeypatch.undo()
        for endpoint in agent.transport._endpoints:  # type: ignore[attr-defined]
            await endpoint.close()

    with_pair(scenario)


def test_blocks_that_a_broken_device_may_still_write_are_counted_with_their_session(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody can say when that ends. It was waited for, and who waited was never told."""

    async def scenario(peer: HandDriven, decode: DecodeSide) -> None:
        request = make_request(2 * BLOCK_SIZE)
        _, frames = await two_frames(peer, request)
        agent = decode.receiver.agent
        monkeypatch.setattr(agent.pool, "begin_scatter", broken)
        monkeypatch.setattr(agent.pool, "settle", broken)
        peer.post(*frames[0])
        await until(lambda: agent.quarantine.num_kept_blocks > 0)
        assert (agent.quarantine.num_kept_blocks, agent.quarantine.num_kept_slots) == (2, 1)
        assert decode.source.of(request.sequence_id) == ["reserved", "failed"]
        assert len(decode.source.free) == NUM_BLOCKS - 2

    with_peer(scenario, gives_all_back=False)


def test_a_node_whose_device_fails_while_nothing_is_computed_starts_afresh(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No step would find out: no sequence that is handed to it ever starts."""

    async def scenario(peer: HandDriven, decode: DecodeSide) -> None:
        told: list[ServingError] = []
        agent = decode.receiver.agent
        agent.quarantine.watch(told.append)
        monkeypatch.setattr(agent.pool, "settle", broken)
        await peer.stream.close()
        await until(lambda: [error.message for error in told] == [device_lost().message])

    with_peer(scenario)


def broken_later(*_: Any, **__: Any) -> asyncio.Future[None]:
    """A move whose error the device says only when it is asked how far it is."""
    move: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    move.set_exception(RuntimeError("nobody foresaw this"))
    return move


PACKINGS = pytest.mark.parametrize("gather", [broken, broken_later], ids=["at once", "later"])


@PACKINGS
def test_a_node_whose_device_fails_at_a_frame_starts_afresh(
    gather: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that gives prefixes away computes nothing. What the device may still touch stays held,
    and holds up nobody who waits for the node's end."""

    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        told: list[ServingError] = []
        sender, request = prefill.sender, make_request(32)
        agent, quarantine = sender.agent, sender.agent.quarantine
        quarantine.watch(told.append)
        monkeypatch.setattr(agent.pool, "begin_gather", gather)
        monkeypatch.setattr(agent.pool, "settle", broken)
        prefill.hand_off(decode, request)
        prefill.compute(request, TABLE)
        await until(lambda: quarantine.num_kept_blocks > 0)
        assert [error.message for error in told] == [device_lost().message]
        assert prefill.owner.of(request.sequence_id) == ["failed"]
        assert prefill.owner.errors[request.sequence_id].reason == "internal"
        assert (quarantine.num_kept_blocks, quarantine.num_kept_slots) == (len(TABLE), 1)
        assert agent.staging.num_free == agent.staging.num_slots - 1
        assert sender.num_transfers == 0
        await until(lambda: len(decode.source.free) == NUM_BLOCKS)

    with_pair(scenario, gives_all_back=False)


@PACKINGS
def test_an_error_that_passes_fails_the_frame_s_transfer_alone(
    gather: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once; sources and slot come back when the device has ended what was begun."""

    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        told: list[ServingError] = []
        agent, settled = prefill.sender.agent, asyncio.Event()
        agent.quarantine.watch(told.append)
        bad, good = make_request(32), make_request(32)
        prefill.hand_off(decode, bad)
        prefill.hand_off(decode, good)
        await until(lambda: len(decode.source.owned) == 2)
        monkeypatch.setattr(agent.pool, "settle", settled.wait)
        with monkeypatch.context() as while_it_fails:
            while_it_fails.setattr(agent.pool, "begin_gather", gather)
            prefill.compute(bad, TABLE)
            await until(lambda: prefill.owner.of(bad.sequence_id) == ["failed"])
        assert agent.staging.num_free == agent.staging.num_slots - 1
        prefill.compute(good, TABLE)
        prefill.sender.commit(good.sequence_id, 7)
        await until(lambda: prefill.owner.of(good.sequence_id) == ["committed", "free"])
        assert prefill.owner.of(bad.sequence_id) == ["failed"]
        settled.set()
        await until(lambda: prefill.owner.of(bad.sequence_id) == ["failed", "free"])
        assert (told, agent.stats.pairings) == ([], 1)

    with_pair(scenario)


def test_a_connection_that_ends_waits_for_what_could_not_be_packed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only then it is known whether slots and sources come back."""

    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        agent, settling, settled = prefill.sender.agent, asyncio.Event(), asyncio.Event()

        async def settle() -> None:
            settling.set()
            await settled.wait()
            broken()

        monkeypatch.setattr(agent.pool, "begin_gather", broken)
        monkeypatch.setattr(agent.pool, "settle", settle)
        request = make_request(32)
        prefill.hand_off(decode, request)
        prefill.compute(request, TABLE)
        await settling.wait()
        [peer] = prefill.sender._peers.values()
        peer.cut()
        await until(lambda: not prefill.sender._peers)
        settled.set()
        await asyncio.wait([peer.running])
        assert agent.quarantine.num_kept_blocks == len(TABLE)

    with_pair(scenario, gives_all_back=False)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_timer_outlives_an_error_of_what_it_calls(
    role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leases, drains and tombstones of all others hang on it."""

    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        swept: Any = prefill.sender if role == "prefill" else decode.receiver
        monkeypatch.setattr(swept, "sweep", broken_once(swept.sweep))
        request = make_request(32)
        prefill.hand_off(decode, request)
        await until(lambda: decode.source.of(request.sequence_id) == ["reserved"])
        await asyncio.sleep(0)
        side: Any = prefill if role == "prefill" else decode
        side.clock.advance(31.0)
        log = prefill.owner if role == "prefill" else decode.source
        await until(lambda: "failed" in log.of(request.sequence_id))

    with_pair(scenario, lease_seconds=30.0)


def broken_once(works: Callable[[], None]) -> Callable[[], None]:
    calls = iter([broken])

    def call() -> None:
        next(calls, works)()

    return call


async def handed_off(prefill: PrefillSide, decode: DecodeSide) -> None:
    """Another prompt goes the same way."""
    request = make_request(32)
    prefill.hand_off(decode, request)
    prefill.compute(request, TABLE)
    prefill.sender.commit(request.sequence_id, 7)
    await until(lambda: prefill.owner.of(request.sequence_id) == ["committed", "free"])
