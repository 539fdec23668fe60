"""A sequence on its decode node: whatever happens in which order, it ends once and frees all."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast
from unittest.mock import Mock

import pytest

from cluster.errors import Cancelled, InvalidRequest, NodeUnavailable, Overloaded, TransferFailed
from cluster.node import Incarnation, NodeId, NodeName, NodeState
from cluster.request import FinishReason, Handoff
from cluster.session_hub import SessionHub
from decode_node.loop import DecodeObserver
from decode_node.recompute import RecomputeBudget
from decode_node.reservations import Reservations
from decode_node.scheduler import DecodeScheduler
from decode_node.service import DecodeHandler
from decode_node.streams import Remembered
from engine.load import LoadSnapshot
from engine.loop import EngineLoop
from kv_transfer.receiving.incoming import IncomingSequence
from kv_transfer.trace import TRACE
from kv_transfer.transports.loopback import LoopbackNetwork, LoopbackTransport
from tests.kv_twins import COMPATIBLE, decode_side, until
from tests.node_doubles import (
    GATEWAY,
    FakeMember,
    Gateway,
    ScriptedEngine,
    advance_timers,
    check_all_free,
    request,
    run_world,
    settle,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from cluster.proto import node_pb2 as pb
    from cluster.request import SequenceRequest
    from decode_node.reservations import ReservedBlocks


class RecordingReceiver:
    """Notes whose transfer the service gives up. The test plays the transfers."""

    def __init__(self) -> None:
        self.cancelled: list[str] = []
        self.doubted: list[str] = []

    def sender_doubted(self, sequence_id: str) -> None:
        self.doubted.append(sequence_id)

    def cancel(self, sequence_id: str) -> None:
        self.cancelled.append(sequence_id)

    def leases(self) -> list[pb.LeaseInfo]:
        return []


class World:
    """Inside a running event loop: the real service, loop and scheduler of a decode node."""

    def __init__(self, num_blocks: int = 32) -> None:
        self.engine = ScriptedEngine(num_blocks)
        self.scheduler = DecodeScheduler(
            self.engine.block_manager,
            64,
            8,
            first_handoff=lambda: self.reservations.first_place,
        )
        self.reservations = Reservations(self.engine.block_manager, self.scheduler)
        self.hub = SessionHub()
        self.handler = DecodeHandler(
            cast("Any", self.engine),
            self.scheduler,
            self.reservations,
            self.hub,
            RecomputeBudget(max_concurrent=2, tokens_per_second=64.0, now=0.0),
        )
        observer = DecodeObserver(
            self.reservations,
            asyncio.get_running_loop(),
            LoadSnapshot(self.scheduler, self.engine.block_manager),
            on_step=self.handler.on_step,
        )
        self.loop = EngineLoop(self.engine, self.scheduler, observer, on_fatal=lambda error: None)
        self.receiver, self.member = RecordingReceiver(), FakeMember()
        self.handler.bind(self.loop, cast("Any", self.receiver), cast("Any", self.member))
        self.gateway = Gateway(self.hub)
        self.loop.start()

    async def reserve(self, request: SequenceRequest) -> ReservedBlocks:
        return await self.handler.reserve(request, self.gateway.id)

    async def reserving(self, request: SequenceRequest) -> asyncio.Task[ReservedBlocks]:
        """A reservation that has reached the engine's thread and waits for room there."""
        asking = asyncio.create_task(self.reserve(request))
        while self.reservations.num_waiting == 0:
            await settle(self.loop)
        return asking

    async def started(self, name: str, **options: Any) -> None:
        """Hand a sequence over and stop the engine inside its first step."""
        self.engine.may_step.clear()
        await self.reserve(request(name, **options))
        await self.handler.start(name, 77)
        await self.engine.held_in_a_step()

    async def check_over(self) -> None:
        await check_all_free(self.loop, self.engine.block_manager)
        assert self.handler.num_streams == 0
        assert self.reservations.num_waiting == self.reservations.num_reserved == 0


def run(body: Callable[[World], Awaitable[None]], **options: Any) -> None:
    run_world(lambda: World(**options), body)


# ---- hand-offs that go well ---------------------------------------------------------------


def test_a_handed_off_sequence_says_started_before_its_tokens_and_frees_its_blocks() -> None:
    async def body(world: World) -> None:
        reserved = await world.reserve(request("a", 9, max_tokens=4))
        assert len(reserved.block_ids) == 3
        await world.handler.start("a", 77)
        started, *decoded = await world.gateway.until_end()
        assert started.started
        assert started.token_ids == ()
        assert sum(len(delta.token_ids) for delta in decoded) == 3, "the first came from prefill"
        assert decoded[-1].finish_reason is FinishReason.LENGTH
        await world.check_over()

    run(body)


def test_a_start_is_traced_on_the_engines_thread_and_then_its_first_launch() -> None:
    async def body(world: World) -> None:
        await world.reserve(request("a", 9, max_tokens=3))
        TRACE.start()
        try:
            await world.handler.start("a", 77)
            await world.gateway.until_end()
        finally:
            points = [mark.point for mark in TRACE.stop()]
        told = [point for point in points if point != "d.token"]  # by the event loop
        assert told == ["d.engine", "d.launch", "d.launch", "d.computed", "d.computed"]
        assert points.count("d.token") == 2

    run(body)


@pytest.mark.parametrize("overlaps", [True, False])
def test_a_start_leaves_the_interpreter_to_an_engine_whose_launches_are_not_its_steps(
    overlaps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(world: World) -> None:
        world.engine.overlaps = overlaps
        stand_aside = Mock(wraps=world.loop.call_and_stand_aside)
        monkeypatch.setattr(world.loop, "call_and_stand_aside", stand_aside)
        await world.reserve(request("a", max_tokens=2))
        await world.handler.start("a", 77)
        await world.gateway.until_end()
        assert stand_aside.called == overlaps

    run(body)


def test_a_sequence_that_ends_before_its_start_is_answered_was_started() -> None:
    async def body(world: World) -> None:
        world.engine.may_step.clear()
        await world.reserve(request("a", max_tokens=2))
        starting = asyncio.ensure_future(world.handler.start("a", 77))
        await asyncio.sleep(0)  # the order is queued; this loop now sleeps through all of it
        assert world.engine.is_stepping.wait(20)
        world.engine.may_step.set()
        world.loop.call(lambda: None).result(20)
        await starting
        ending = (await world.gateway.until_end())[-1]
        assert ending.finish_reason is FinishReason.LENGTH
        await world.check_over()

    run(body)


def test_a_prompt_computed_here_needs_no_transfer() -> None:
    async def body(world: World) -> None:
        world.handler.submit(GATEWAY, request("a", max_tokens=3), None)
        deltas = await world.gateway.until_end()
        assert sum(len(delta.token_ids) for delta in deltas) == 3
        await world.check_over()

    run(body)


# ---- cancel, in each state ----------------------------------------------------------------


def test_a_reserve_that_its_cancel_overtook_is_refused() -> None:
    async def body(world: World) -> None:
        world.handler.cancel("a")
        with pytest.raises(Cancelled):
            await world.reserve(request("a"))
        await world.check_over()

    run(body)


def test_cancel_while_waiting_for_room_gives_up_the_place_in_the_queue() -> None:
    async def body(world: World) -> None:
        await world.reserve(request("big", 12))
        asking = await world.reserving(request("a", 8))
        world.handler.cancel("a")
        assert world.receiver.cancelled == ["a"]
        asking.cancel()  # as the receiver does
        with pytest.raises(asyncio.CancelledError):
            await asking
        await settle(world.loop)
        assert world.reservations.num_waiting == 0
        assert len((await world.reserve(request("b", 3))).block_ids) == 1
        for name in ("big", "b"):
            world.handler.on_transfer_withdrawn(name)
            world.handler.release(name)
        await world.check_over()

    run(body, num_blocks=4)


def test_a_reservation_given_up_as_it_is_served_comes_back() -> None:
    async def body(world: World) -> None:
        await world.reserve(request("big", 12))
        asking = await world.reserving(request("a", 8))
        world.handler.release("big")
        world.loop.call(lambda: None).result(20)  # served, and this loop does not know yet
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        world.handler.on_transfer_withdrawn("big")
        await world.check_over()

    run(body, num_blocks=4)


def test_who_waits_for_blocks_that_no_sequence_has_gets_them_on_an_idle_node() -> None:
    """A copy to host memory has them, or another node reads them as a prefix: that ends between two
    steps, and no step may follow."""

    async def body(world: World) -> None:
        manager = world.engine.block_manager
        lent = world.loop.call(lambda: manager.reserve((), 12)).result(20)
        assert lent is not None
        asking = await world.reserving(request("a", 8))
        world.loop.call(lent.cancel).result(20)
        assert len((await asyncio.wait_for(asking, 20)).block_ids) == 2
        world.handler.on_transfer_withdrawn("a")
        world.handler.release("a")
        await world.check_over()

    run(body, num_blocks=4)


def test_cancel_between_reserve_and_start_refuses_the_start() -> None:
    async def body(world: World) -> None:
        await world.reserve(request("a"))
        world.handler.cancel("a")
        assert world.receiver.cancelled == ["a"]
        with pytest.raises(Cancelled):
            await world.handler.start("a", 77)
        world.handler.release("a")
        assert await world.gateway.published() == []
        await world.check_over()

    run(body)


def test_cancel_while_the_start_is_under_way_ends_what_was_started() -> None:
    async def body(world: World) -> None:
        await world.reserve(request("a"))
        await world.started("busy")
        starting = asyncio.ensure_future(world.handler.start("a", 77))
        await asyncio.sleep(0)
        world.handler.cancel("a")
        world.engine.may_step.set()
        with pytest.raises(Cancelled):
            await starting
        world.handler.release("a")
        deltas = await world.gateway.until_end()
        assert {delta.sequence_id for delta in deltas} == {"busy"}
        await world.check_over()

    run(body)


def test_cancel_while_running_ends_it_without_a_word() -> None:
    async def body(world: World) -> None:
        await world.started("a", max_tokens=1000)
        world.handler.cancel("a")
        world.engine.may_step.set()
        assert world.receiver.cancelled == []
        await world.check_over()
        assert [delta.started for delta in await world.gateway.published()] == [True]

    run(body)


# ---- orphans: started or an error, never silence ------------------------------------------


def test_an_orphan_never_reserved_is_lost_and_its_late_reserve_is_refused() -> None:
    async def body(world: World) -> None:
        world.handler.orphaned(GATEWAY, "a")
        (ending,) = await world.gateway.until_end()
        assert ending.error is not None
        assert ending.error.code == "node_lost"
        with pytest.raises(Cancelled):
            await world.reserve(request("a"))
        await world.check_over()

    run(body)


def test_an_orphan_whose_transfer_completes_is_started() -> None:
    async def body(world: World) -> None:
        await world.reserve(request("a"))
        world.handler.orphaned(GATEWAY, "a")
        assert await world.gateway.published() == []
        assert world.receiver.doubted == ["a"], "its transfer must end, whatever its sender says"
        await world.handler.start("a", 77)
        deltas = await world.gateway.until_end()
        assert deltas[0].started
        assert deltas[-1].finish_reason is FinishReason.LENGTH
        await world.check_over()

    run(body)


def test_an_orphan_whose_transfer_fails_gets_one_error() -> None:
    async def body(world: World) -> None:
        await world.reserve(request("a"))
        world.handler.orphaned(GATEWAY, "a")
        world.handler.on_transfer_failed("a", TransferFailed("lost", reason="prefill_lost"))
        world.handler.release("a")
        (ending,) = await world.gateway.published()
        assert ending.error is not None
        assert ending.error.code == "kv_load_failed"
        await world.check_over()

    run(body)


def test_an_orphan_whose_transfer_is_withdrawn_is_lost() -> None:
    async def body(world: World) -> None:
        await world.reserve(request("a"))
        world.handler.orphaned(GATEWAY, "a")
        world.handler.on_transfer_withdrawn("a")
        world.handler.release("a")
        (ending,) = await world.gateway.published()
        assert ending.error is not None
        assert ending.error.code == "node_lost"
        await world.check_over()

    run(body)


def test_an_orphan_that_gets_no_room_is_lost() -> None:
    async def body(world: World) -> None:
        await world.reserve(request("big", 12))
        asking = await world.reserving(request("a", 8))
        world.handler.orphaned(GATEWAY, "a")
        world.handler.release("a")
        with pytest.raises(Cancelled):
            await asking
        (ending,) = await world.gateway.published()
        assert ending.error is not None
        assert ending.error.code == "node_lost"
        world.handler.on_transfer_withdrawn("big")
        world.handler.release("big")
        await world.check_over()

    run(body, num_blocks=4)


def test_an_orphan_that_runs_is_said_to_be_started_again() -> None:
    async def body(world: World) -> None:
        await world.started("a")
        world.handler.orphaned(GATEWAY, "a")
        assert [delta.started for delta in await world.gateway.published()] == [True, True]
        world.engine.may_step.set()
        await world.gateway.until_end()
        await world.check_over()

    run(body)


def test_an_orphan_that_has_finished_gets_no_second_ending() -> None:
    async def body(world: World) -> None:
        await world.reserve(request("a"))
        await world.handler.start("a", 77)
        await world.gateway.until_end()
        world.handler.orphaned(GATEWAY, "a")
        assert await world.gateway.published() == []

    run(body)


def test_a_transfer_withdrawn_because_prefill_finished_it_is_no_error() -> None:
    async def body(world: World) -> None:
        await world.reserve(request("a"))
        world.handler.on_transfer_withdrawn("a")
        world.handler.release("a")
        assert await world.gateway.published() == []
        await world.check_over()

    run(body)


# ---- other endings ------------------------------------------------------------------------


def test_a_gateway_that_goes_takes_all_of_its_sequences_and_no_others() -> None:
    async def body(world: World) -> None:
        other = Gateway(world.hub, "gateway-2")
        await world.reserve(request("reserved"))
        await world.started("running", max_tokens=1000)
        world.handler.submit(other.id, request("others"), None)
        world.gateway.leave()
        world.handler.gateway_gone(world.gateway.id)
        assert world.receiver.cancelled == ["reserved"]
        world.handler.on_transfer_withdrawn("reserved")
        world.handler.release("reserved")
        world.engine.may_step.set()
        ending = (await other.until_end())[-1]
        assert (ending.sequence_id, ending.finish_reason) == ("others", FinishReason.LENGTH)
        await world.check_over()

    run(body)


def test_a_gateway_that_goes_takes_the_others_also_when_one_cannot_be_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def body(world: World) -> None:
        await world.reserve(request("reserved"))
        await world.started("running", max_tokens=1000)

        def broken(_: str) -> None:
            raise RuntimeError("nobody foresaw this")

        monkeypatch.setattr(world.receiver, "cancel", broken)
        world.gateway.leave()
        world.handler.gateway_gone(world.gateway.id)
        world.handler.release("reserved")
        world.engine.may_step.set()
        await world.check_over()

    run(body)


def test_nothing_is_reserved_for_a_gateway_that_is_not_there() -> None:
    async def body(world: World) -> None:
        world.gateway.leave()
        with pytest.raises(Cancelled):
            await world.reserve(request("a"))
        await world.check_over()

    run(body)


def test_a_deadline_ends_what_runs_and_what_still_arrives() -> None:
    async def body(world: World) -> None:
        await world.reserve(request("arriving", deadline=5.0))
        await world.started("running", max_tokens=1000, deadline=5.0)
        await world.gateway.published()
        advance_timers(10.0)
        endings = await world.gateway.until_end() + await world.gateway.until_end()
        assert {delta.sequence_id for delta in endings} == {"running", "arriving"}
        assert all(d.error and d.error.code == "deadline_exceeded" for d in endings)
        assert world.receiver.cancelled == ["arriving"]
        world.handler.release("arriving")
        world.engine.may_step.set()
        await world.check_over()

    run(body)


def test_a_sequence_that_has_ended_outlives_its_deadline_in_peace() -> None:
    async def body(world: World) -> None:
        world.handler.submit(GATEWAY, request("a", deadline=5.0), None)
        await world.gateway.until_end()
        await world.reserve(request("b", deadline=5.0))
        world.handler.on_transfer_withdrawn("b")
        world.handler.release("b")
        advance_timers(10.0)
        await settle(world.loop)
        assert await world.gateway.published() == []
        assert world.receiver.cancelled == []

    run(body)


def test_a_failed_step_ends_its_sequences_typed_and_frees_their_blocks() -> None:
    async def body(world: World) -> None:
        await world.started("a")
        world.engine.is_failing = True
        world.engine.may_step.set()
        ending = (await world.gateway.until_end())[-1]
        assert ending.error is not None
        assert ending.error.code == "internal"
        await world.check_over()

    run(body)


def test_blocks_of_a_start_that_the_scheduler_refuses_come_back() -> None:
    async def body(world: World) -> None:
        def add(sequence: Any) -> None:
            raise Overloaded("no more")

        await world.reserve(request("a"))
        world.scheduler.add = add  # type: ignore[method-assign]
        with pytest.raises(Overloaded):
            await world.handler.start("a", 77)
        world.handler.on_transfer_failed("a", Overloaded("no more"))
        world.handler.release("a")
        await world.check_over()

    run(body)


@pytest.mark.parametrize("defect", [Overloaded("no more"), RuntimeError("a defect")])
def test_a_prompt_that_cannot_be_queued_ends_typed(defect: Exception) -> None:
    async def body(world: World) -> None:
        def add(sequence: Any) -> None:
            raise defect

        world.scheduler.add = add  # type: ignore[method-assign]
        world.handler.submit(GATEWAY, request("a"), None)
        (ending,) = await world.gateway.until_end()
        assert ending.error is not None
        assert ending.error.code == getattr(defect, "code", "internal")
        await world.check_over()

    run(body)


# ---- who is taken -------------------------------------------------------------------------


@pytest.mark.parametrize("state", [NodeState.CORDONED, NodeState.DRAINING])
def test_a_node_on_its_way_out_takes_hand_offs_under_way_but_no_new_work(state: NodeState) -> None:
    async def body(world: World) -> None:
        world.member.state = state
        with pytest.raises(NodeUnavailable):
            world.handler.submit(GATEWAY, request("new"), None)
        await world.reserve(request("a"))
        await world.handler.start("a", 77)
        assert (await world.gateway.until_end())[-1].finish_reason is FinishReason.LENGTH
        world.member.state = NodeState.DRAINED
        with pytest.raises(NodeUnavailable):
            await world.reserve(request("b"))
        await world.check_over()

    run(body)


def test_what_a_decode_node_cannot_take_is_refused_before_any_work() -> None:
    async def body(world: World) -> None:
        decode = NodeId(NodeName("d"), Incarnation(1))
        handoff = Handoff(
            transfer_id=bytes(16), attempt=1, decode=decode, decode_address="", gateway_id=GATEWAY
        )
        with pytest.raises(InvalidRequest):
            world.handler.submit(GATEWAY, request("a"), handoff)
        await world.reserve(request("a"))
        with pytest.raises(InvalidRequest):
            world.handler.submit(GATEWAY, request("a"), None)
        reply = await world.handler.inspect()
        assert [(s.sequence_id, s.status) for s in reply.sequences] == [("a", "waiting_for_kv")]

    run(body)


def test_the_oldest_of_too_many_remembered_ids_is_forgotten() -> None:
    remembered = Remembered(capacity=2)
    for name in ("a", "b", "a", "c"):
        remembered.add(name)
    assert "a" in remembered
    assert "b" not in remembered
    assert "c" in remembered


# ---- a real receiver ------------------------------------------------------------------------


def test_a_hand_off_given_up_before_it_began_to_ask_leaves_nothing_behind() -> None:
    """Reserve and the loss of its sender in one turn of the loop: the asking must still end."""

    async def body() -> None:
        async with decode_side(LoopbackTransport(LoopbackNetwork())) as decode:
            receiver = decode.receiver
            session = receiver.open_session(NodeId(NodeName("p"), Incarnation(1)), COMPATIBLE)
            wanted = request("a")
            incoming = IncomingSequence(
                transfer_id=bytes(16), attempt=1, request=wanted, gateway_id=GATEWAY
            )
            receiver.reserve_asked(session, incoming)
            receiver.close_session(session)
            await until(lambda: receiver.num_transfers == 0)
            assert not decode.source.owned

    asyncio.run(body())


# ---- what a failed hand-off leaves --------------------------------------------------------


def test_a_failed_hand_off_goes_on_here_with_the_blocks_that_are_right() -> None:
    async def body(world: World) -> None:
        world.handler.submit(GATEWAY, request("undisturbed", 9, max_tokens=4), None)
        undisturbed = [t for d in await world.gateway.until_end() for t in d.token_ids]
        await world.reserve(request("a", 9, max_tokens=4))
        assert world.handler.may_recompute("a", 1)
        world.handler.recompute("a", 1)
        started, *decoded = await world.gateway.until_end()
        assert started.started
        assert started.recomputed
        assert [t for delta in decoded for t in delta.token_ids] == undisturbed
        await world.check_over()

    run(body)


def test_a_cancel_between_the_failure_and_the_recompute_frees_the_blocks() -> None:
    async def body(world: World) -> None:
        await world.reserve(request("a", 9))
        assert world.handler.may_recompute("a", 1)
        world.handler.cancel("a")
        world.handler.recompute("a", 1)
        await world.check_over()
        assert world.handler._budget.num_running == 0

    run(body)


def test_an_orphan_that_is_recomputed_is_answered_so_before_it_runs() -> None:
    async def body(world: World) -> None:
        await world.reserve(request("a", 9, max_tokens=2))
        assert world.handler.may_recompute("a", 0)
        world.handler.orphaned(GATEWAY, "a")
        world.handler.recompute("a", 0)
        first, second, *_ = await world.gateway.until_end()
        assert first.recomputed
        assert second.recomputed
        await world.check_over()

    run(body)


def test_over_the_budget_the_policy_is_to_fail() -> None:
    async def body(world: World) -> None:
        for name in ("a", "b", "c"):
            await world.reserve(request(name, 3))
        assert [world.handler.may_recompute(name, 0) for name in ("a", "b", "c")] == [
            True,
            True,
            False,
        ]
        for name in ("a", "b"):
            world.handler.cancel(name)
            world.handler.recompute(name, 0)
        assert world.handler.may_recompute("c", 0)
        world.handler.cancel("c")
        world.handler.release("c")
        await world.check_over()

    run(body)


def test_a_first_token_that_the_model_does_not_have_starts_nothing() -> None:
    """It would be looked up, with the tokens of everybody else's sequences, in the next step."""

    async def scenario() -> None:
        world = World()
        world.engine.model_config.vocab_size = 50
        await world.reserve(request("s"))
        with pytest.raises(TransferFailed) as refused:
            await world.handler.start("s", 50)
        world.handler.on_transfer_failed("s", refused.value)
        world.handler.release("s")
        await world.check_over()

    asyncio.run(scenario())


# ---- the log ------------------------------------------------------------------------------


def ends_told(caplog: pytest.LogCaptureFixture) -> list[tuple[object, object, object]]:
    """Of each sequence that the log says ended: its request, itself, and how."""
    facts = [each.__dict__ for each in caplog.records if "a sequence ended" in each.getMessage()]
    return [
        (each.get("request_id"), each["sequence_id"], each.get("outcome") or each["error"])
        for each in facts
    ]


def test_the_log_says_under_the_id_of_the_request_how_each_sequence_ended(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def body(world: World) -> None:
        await world.reserve(request("a", 9, max_tokens=2))
        await world.handler.start("a", 77)
        await world.gateway.until_end()
        for name in ("b", "c", "d"):
            await world.reserve(request(name))
        world.handler.cancel("b")
        world.handler.on_transfer_failed("c", TransferFailed("broken", reason="digest_mismatch"))
        world.handler.on_transfer_withdrawn("d")
        for name in ("b", "c", "d"):
            world.handler.release(name)
        await world.check_over()

    with caplog.at_level("INFO"):
        run(body)
    assert ends_told(caplog) == [
        ("request-a", "a", "length"),
        ("request-b", "b", "cancelled"),
        ("request-c", "c", "kv_load_failed"),
        ("request-d", "d", "withdrawn"),
    ]
