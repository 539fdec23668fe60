from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from cluster.delta_codec import decode_delta
from cluster.errors import NodeLost, NodeUnavailable
from cluster.node import NodeState
from cluster.proto import node_pb2 as pb
from cluster.request import FinishReason, TokenDelta, TokenLogprobs
from cluster.session_hub import MAX_FRAME_BYTES, Session, SessionHub
from cluster.state_notices import ANSWER_SECONDS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await scenario()

    asyncio.run(main())


def tokens(sequence_id: str, *token_ids: int, finish: FinishReason | None = None) -> TokenDelta:
    return TokenDelta(sequence_id=sequence_id, token_ids=token_ids, finish_reason=finish)


async def take(session: Session) -> list[TokenDelta]:
    frame = await anext(session)
    return [decode_delta(delta) for delta in frame.step.deltas]


def test_the_deltas_of_a_step_travel_in_one_frame_per_gateway() -> None:
    async def scenario() -> None:
        hub = SessionHub()
        first, second = hub.open("g1"), hub.open("g2")
        assert hub.num_connected == 2
        hub.publish("g1", [tokens("a", 1), tokens("b", 2)])
        hub.publish("g2", [tokens("c", 3)])
        assert await take(first) == [tokens("a", 1), tokens("b", 2)]
        assert await take(second) == [tokens("c", 3)]

    run(scenario)


def test_what_gathers_while_the_stream_is_slow_is_merged_in_order() -> None:
    async def scenario() -> None:
        hub = SessionHub()
        session = hub.open("g")
        hub.publish("g", [tokens("a", 1), tokens("b", 9)])
        hub.publish("g", [tokens("a", 2)])
        hub.publish("g", [tokens("a", 3, finish=FinishReason.STOP)])
        merged = tokens("a", 1, 2, 3, finish=FinishReason.STOP)
        assert await take(session) == [merged, tokens("b", 9)]

    run(scenario)


def test_merging_keeps_every_fact() -> None:
    async def scenario() -> None:
        hub = SessionHub()
        session = hub.open("g")
        one, two = TokenLogprobs(-1.0, ((1, -1.0),)), TokenLogprobs(-2.0)
        lost = NodeLost("Gone.")
        deltas = [
            TokenDelta(sequence_id="a", started=True),
            TokenDelta(sequence_id="a", token_ids=(1,), logprobs=(one,), num_cached_tokens=4),
            TokenDelta(sequence_id="a", token_ids=(2,), logprobs=(two,)),
            TokenDelta(sequence_id="b", token_ids=(5,)),
            TokenDelta(sequence_id="b", error=lost),
            TokenDelta(sequence_id="c", token_ids=(6,)),
            TokenDelta(sequence_id="c", handed_off=True),
        ]
        hub.publish("g", deltas)
        got = await take(session)
        assert [(d.sequence_id, d.token_ids) for d in got] == [
            ("a", ()),
            ("a", (1, 2)),
            ("b", (5,)),
            ("b", ()),
            ("c", (6,)),
            ("c", ()),
        ]
        assert got[0].started
        assert got[1].logprobs == (one, two)
        assert got[1].num_cached_tokens == 4
        assert got[2].error is None, "the gateway would take no token of it"
        assert isinstance(got[3].error, NodeLost)
        assert got[5].handed_off

    run(scenario)


def test_nothing_joins_a_delta_that_has_been_sent_or_has_ended() -> None:
    async def scenario() -> None:
        hub = SessionHub()
        session = hub.open("g")
        hub.publish("g", [tokens("a", 1)])
        assert await take(session) == [tokens("a", 1)]
        hub.publish("g", [tokens("a", 2, finish=FinishReason.STOP), tokens("a", 3)])
        assert await take(session) == [tokens("a", 2, finish=FinishReason.STOP), tokens("a", 3)]

    run(scenario)


def test_a_waiting_consumer_is_woken_and_ends_with_the_session() -> None:
    async def scenario() -> None:
        hub = SessionHub()
        session = hub.open("g")
        first = asyncio.create_task(take(session))
        await asyncio.sleep(0)
        hub.publish("g", [tokens("a", 1)])
        assert await first == [tokens("a", 1)]
        second = asyncio.create_task(take(session))
        await asyncio.sleep(0)
        session.close()
        with pytest.raises(StopAsyncIteration):
            await second

    run(scenario)


def test_frames_stay_small_and_lose_nothing() -> None:
    async def scenario() -> None:
        hub = SessionHub()
        session = hub.open("g")
        for token in range(3000):
            top = tuple((i, -1.0) for i in range(20))
            delta = TokenDelta(
                sequence_id=f"s{token % 2}",
                token_ids=(token,),
                logprobs=(TokenLogprobs(-1.0, top),),
            )
            for _ in range(5):
                hub.publish("g", [delta])
        received: dict[str, list[int]] = {"s0": [], "s1": []}
        num_frames = 0
        while sum(len(ids) for ids in received.values()) < 15_000:
            step = (await anext(session)).step
            num_frames += 1
            assert step.ByteSize() <= MAX_FRAME_BYTES
            for delta in (decode_delta(message) for message in step.deltas):
                received[delta.sequence_id] += delta.token_ids
        assert num_frames > 1
        for parity, ids in enumerate(received.values()):
            assert ids == [t for t in range(3000) if t % 2 == parity for _ in range(5)]

    run(scenario)


def test_one_long_backlog_of_one_sequence_is_split_too() -> None:
    async def scenario() -> None:
        hub = SessionHub()
        session = hub.open("g")
        for _ in range(100):
            hub.publish("g", [tokens("a", *([2**31 - 1] * 10_000))])
        num_tokens = 0
        while num_tokens < 1_000_000:
            step = (await anext(session)).step
            assert step.ByteSize() <= MAX_FRAME_BYTES
            num_tokens += sum(len(delta.token_ids) for delta in step.deltas)

    run(scenario)


def test_a_gateway_that_does_not_read_is_dropped_others_are_not() -> None:
    async def scenario() -> None:
        dropped: list[str] = []
        hub = SessionHub(max_pending_bytes=10_000, on_drop=dropped.append)
        interrupted = asyncio.Event()

        async def serve_slowly() -> None:
            session = hub.open("slow")
            try:
                await asyncio.Event().wait()  # a write that never completes
            except asyncio.CancelledError:
                interrupted.set()
                assert hub.close(session)
                raise

        serving = asyncio.create_task(serve_slowly())
        other = hub.open("other")
        await asyncio.sleep(0)
        for token in range(5_000):
            hub.publish("slow", [tokens("a", token)])
        hub.publish("other", [tokens("b", 1)])
        assert dropped == ["slow"]
        assert not hub.is_open("slow")
        await asyncio.gather(serving, return_exceptions=True)
        assert interrupted.is_set()
        assert await take(other) == [tokens("b", 1)]
        assert hub.is_open("other")

    run(scenario)


def test_draining_makes_room_again() -> None:
    async def scenario() -> None:
        hub = SessionHub(max_pending_bytes=1_000)
        session = hub.open("g")
        for token in range(1_000):
            hub.publish("g", [tokens("a", token)])
            assert await take(session) == [tokens("a", token)]
        assert hub.is_open("g")

    run(scenario)


def test_a_second_stream_of_a_gateway_waits_until_the_first_has_ended() -> None:
    async def scenario() -> None:
        hub = SessionHub()

        async def serve() -> None:
            session = hub.open("g")
            try:
                await anext(session)
            finally:
                assert hub.close(session)
                assert not hub.close(session)

        first = asyncio.create_task(serve())
        await asyncio.sleep(0)
        with pytest.raises(NodeUnavailable):
            hub.open("g")
        await asyncio.gather(first, return_exceptions=True)
        again = hub.open("g")
        hub.publish("g", [tokens("a", 1)])
        assert await take(again) == [tokens("a", 1)]

    run(scenario)


def test_deltas_for_nobody_are_dropped_silently() -> None:
    async def scenario() -> None:
        hub = SessionHub()
        hub.publish("nobody", [tokens("a", 1)])
        session = hub.open("g")
        session.close()
        hub.publish("g", [tokens("a", 1)])
        assert not hub.is_open("g")
        with pytest.raises(StopAsyncIteration):
            await anext(session)

    run(scenario)


def test_a_sequence_that_ends_in_an_error_is_in_the_nodes_log_under_its_id(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        hub = SessionHub()
        hub.open("g")
        error = NodeLost("lost", reason="prefill_lost")
        hub.publish("g", [tokens("a", 1), TokenDelta(sequence_id="b", error=error)])

    with caplog.at_level("INFO"):
        run(scenario)
    (record,) = caplog.records
    facts = record.__dict__
    assert (facts["sequence_id"], facts["error"]) == ("b", "node_lost")
    assert facts["reason"] == "prefill_lost"


# ---- the node's state ---------------------------------------------------------------------


async def notice(session: Session) -> tuple[str, int]:
    frame = await anext(session)
    assert frame.WhichOneof("frame") == "state_notice"
    return frame.state_notice.state, frame.state_notice.number


def settled(number: int) -> pb.StateAnswer:
    return pb.StateAnswer(number=number, is_settled=True)


def test_a_notice_has_its_place_between_what_was_said_before_and_after() -> None:
    """Who answers to it has read the one; what is refused because of it is the other."""

    async def scenario() -> None:
        hub = SessionHub()
        session = hub.open("g", hears_state=True)
        hub.publish("g", [tokens("a", 1), tokens("b", 2)])
        hub.tell(NodeState.DRAINING)
        refused = TokenDelta(sequence_id="c", error=NodeUnavailable("x", reason="not_ready"))
        hub.publish("g", [refused, tokens("a", 3)])
        assert await take(session) == [tokens("a", 1, 3), tokens("b", 2)]
        assert (await notice(session))[0] == "draining"
        assert [delta.sequence_id for delta in await take(session)] == ["c"]

    run(scenario)


def test_a_notice_waits_for_every_frame_of_a_long_backlog() -> None:
    async def scenario() -> None:
        hub = SessionHub()
        session = hub.open("g", hears_state=True)
        for number in range(20):
            hub.publish("g", [tokens(f"s{number}", *([2**31 - 1] * 30_000))])
        hub.tell(NodeState.DRAINED)
        num_before = 0
        while (frame := await anext(session)).WhichOneof("frame") == "step":
            num_before += len(frame.step.deltas)
        assert (num_before, frame.state_notice.state) == (20, "drained")

    run(scenario)


def test_a_notice_wakes_a_waiting_consumer() -> None:
    async def scenario() -> None:
        hub = SessionHub()
        session = hub.open("g", hears_state=True)
        waiting = asyncio.create_task(notice(session))
        await asyncio.sleep(0)
        hub.tell(NodeState.DRAINING)
        assert (await waiting)[0] == "draining"

    run(scenario)


def test_of_several_states_that_wait_the_last_is_told() -> None:
    async def scenario() -> None:
        hub = SessionHub()
        session = hub.open("g", hears_state=True)
        for state in (NodeState.DRAINING, NodeState.READY, NodeState.CORDONED):
            hub.tell(state)
        told, number = await notice(session)
        assert told == "cordoned"
        hub.answered("g", settled(number))
        assert hub.is_answered

    run(scenario)


def test_a_session_that_opens_later_begins_with_the_state_as_it_is() -> None:
    async def scenario() -> None:
        hub = SessionHub()
        hub.tell(NodeState.DRAINING)
        session = hub.open("g", hears_state=True)
        assert not hub.is_answered
        state, number = await notice(session)
        assert state == "draining"
        hub.answered("g", settled(number))
        assert hub.is_answered

    run(scenario)


def test_a_gateway_that_hears_no_states_is_told_none_and_not_waited_for() -> None:
    """An older one: it would end the session at a frame that it does not know."""

    async def scenario() -> None:
        hub = SessionHub()
        hub.tell(NodeState.READY)
        session = hub.open("old")
        hub.tell(NodeState.DRAINING)
        hub.publish("old", [tokens("a", 1)])
        assert await take(session) == [tokens("a", 1)]
        assert hub.is_answered

    run(scenario)


def test_who_leaves_waits_for_a_gateway_until_all_has_come_but_for_none_that_stands_still() -> None:
    async def scenario() -> None:
        now = [0.0]
        hub = SessionHub(clock=lambda: now[0])
        session = hub.open("g", hears_state=True)
        hub.open("still", hears_state=True)
        hub.tell(NodeState.DRAINING)
        number = (await notice(session))[1]
        hub.answered("g", pb.StateAnswer(number=number))
        now[0] += ANSWER_SECONDS
        assert not hub.is_answered
        hub.answered("g", settled(number))
        assert hub.is_answered

    run(scenario)


def test_who_leaves_waits_for_no_session_that_has_ended() -> None:
    async def scenario() -> None:
        hub = SessionHub()
        gone, stays = hub.open("gone", hears_state=True), hub.open("stays", hears_state=True)
        hub.tell(NodeState.DRAINING)
        hub.answered("stays", settled((await notice(stays))[1]))
        assert not hub.is_answered
        hub.close(gone)
        assert hub.is_answered
        hub.tell(NodeState.DRAINED)
        assert not hub.is_answered

    run(scenario)


def test_an_end_in_order_still_brings_what_waits_and_takes_nothing_more() -> None:
    async def scenario() -> None:
        hub = SessionHub()
        session = hub.open("g", hears_state=True)
        hub.publish("g", [tokens("a", 1, finish=FinishReason.STOP)])
        hub.tell(NodeState.DRAINED)
        hub.close_all()
        hub.publish("g", [tokens("b", 2)])
        assert await take(session) == [tokens("a", 1, finish=FinishReason.STOP)]
        assert (await notice(session))[0] == "drained"
        with pytest.raises(StopAsyncIteration):
            await anext(session)

    run(scenario)
