"""Data links that swallow what is posted, and those that are only slow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kv_transfer.receiving.silence import SILENT_SECONDS, Silence
from kv_transfer.sending.kv_session import renew_frame
from kv_transfer.sweeping import MAX_SECONDS
from tests.kv_faults import HandDriven, two_frames
from tests.kv_transfer.catalogue_worlds import TABLE, stop_timers, with_hanging_link, with_peer
from tests.kv_twins import BLOCK_SIZE, NUM_BLOCKS, DecodeSide, PrefillSide, make_request, until

if TYPE_CHECKING:
    from kv_transfer.transfer import Ticket

NUM_LOOKS = int(SILENT_SECONDS / MAX_SECONDS)


class Looking:
    """A silence, and who looks as often as a sweep does."""

    def __init__(self, num_posted: int) -> None:
        self.silence = Silence()
        self.now = 1000.0
        self.look(1)
        self.silence.told(num_posted)

    def look(self, count: int, *, seconds: float = MAX_SECONDS, is_busy: bool = False) -> bool:
        """The last answer."""
        answer = False
        for _ in range(count):
            self.now += seconds
            answer = self.silence.lasts(self.now, is_busy=is_busy)
        return answer


def test_messages_that_do_not_come_for_long_are_not_waited_for() -> None:
    looking = Looking(2)
    looking.silence.heard()
    assert not looking.look(NUM_LOOKS - 1)
    assert looking.look(1)


def test_a_link_that_is_idle_or_brings_one_message_in_all_that_time_moves() -> None:
    looking = Looking(0)
    assert not looking.look(2 * NUM_LOOKS)
    looking.silence.told(3)
    for _ in range(3):
        assert not looking.look(NUM_LOOKS - 1)
        looking.silence.heard()
    assert not looking.look(2 * NUM_LOOKS)


def test_no_message_is_missed_while_a_payload_is_on_its_way() -> None:
    looking = Looking(2)
    assert not looking.look(2 * NUM_LOOKS, is_busy=True)
    assert not looking.look(NUM_LOOKS - 1)
    assert not looking.look(1, is_busy=True)
    assert not looking.look(NUM_LOOKS - 1)


def test_time_in_which_this_process_was_stopped_does_not_count() -> None:
    looking = Looking(1)
    assert not looking.look(1, seconds=600.0)


def test_a_link_that_swallows_everything_is_given_up_long_before_its_transfers_are() -> None:
    """Its sender cannot know: all that it posted has left. Both ends have their blocks back."""

    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        stop_timers(prefill, decode)
        request = make_request(32)
        name = request.sequence_id
        prefill.hand_off(decode, request)
        prefill.compute(request, TABLE)
        prefill.sender.commit(name, 7)
        [peer] = prefill.sender._peers.values()
        await until(lambda: peer.num_posted == 2)
        prefill.clock.advance(prefill.sender.agent.config.lease_seconds / 6)
        prefill.sender.sweep()
        [session] = decode.receiver._sessions
        await until(lambda: session._silence._num_posted == 2)
        look(decode)
        await until(lambda: prefill.owner.of(name) == ["failed", "free"])
        await until(lambda: len(decode.source.free) == NUM_BLOCKS)
        assert decode.source.errors[name].reason == "link_lost"

    with_hanging_link(scenario)


def test_a_payload_that_comes_slowly_ends_no_session() -> None:
    async def scenario(peer: HandDriven, decode: DecodeSide) -> None:
        stop_timers(None, decode)
        ticket, [first, second] = await two_frames(peer, make_request(2 * BLOCK_SIZE))
        await peer.post_header(first[0])
        await told_posted(peer, decode, ticket, 3)
        await until(lambda: decode.receiver.session_with("p0")._landings.is_busy)  # type: ignore[union-attr]
        look(decode)
        peer.endpoint.send(first[1], ticket.nonce)
        await peer.post(*second)
        peer.commit(ticket, num_frames=2)
        await peer.next("committed")

    with_peer(scenario)


def test_headers_that_wait_for_a_slot_here_end_no_session() -> None:
    async def scenario(peer: HandDriven, decode: DecodeSide) -> None:
        stop_timers(None, decode)
        ticket, frames = await two_frames(peer, make_request(2 * BLOCK_SIZE))
        staging = decode.receiver.agent.staging
        taken = [slot for other in range(4) if (slot := staging.take(other)) is not None]
        assert staging.num_free == 0
        sends = [peer.post(*frame) for frame in frames]
        await told_posted(peer, decode, ticket, 3)
        look(decode)
        for slot in taken:
            staging.release(slot)
        for sent in sends:
            await sent
        peer.commit(ticket, num_frames=2)
        await peer.next("committed")

    with_peer(scenario)


async def told_posted(peer: HandDriven, decode: DecodeSide, ticket: Ticket, count: int) -> None:
    peer.stream.send(renew_frame(ticket.transfer_id, 20.0, count))
    [session] = decode.receiver._sessions
    await until(lambda: session._silence._num_posted == count)


def look(decode: DecodeSide) -> None:
    """As long as a silence may last, as sweeps do."""
    for _ in range(NUM_LOOKS + 1):
        decode.clock.advance(MAX_SECONDS)
        decode.receiver.sweep()
