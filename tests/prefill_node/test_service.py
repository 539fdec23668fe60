"""A prompt on its prefill node: each ends once, and everything it held comes back."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import pytest

from cluster.errors import InvalidRequest, NodeUnavailable, TransferFailed
from cluster.node import Incarnation, NodeId, NodeName, NodeState
from cluster.proto import node_pb2 as pb
from cluster.request import FinishReason, Handoff, PrefixHolder
from cluster.session_hub import SessionHub
from engine.load import LoadSnapshot
from engine.loop import EngineLoop
from prefill_node.loop import LayerFacts, PrefillObserver
from prefill_node.scheduler import PrefillScheduler
from prefill_node.service import PrefillHandler
from tests.node_doubles import (
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
    from collections.abc import Awaitable, Callable, Sequence

    from cluster.request import SequenceRequest

HANDOFF = Handoff(
    transfer_id=bytes(16),
    attempt=1,
    decode=NodeId(NodeName("decode-0"), Incarnation(1)),
    decode_address="127.0.0.1:1",
    gateway_id="gateway-1",
)


class RecordingSender:
    """Notes what the service asks for. Sources stay held until the test frees them."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.opened: dict[str, SequenceRequest] = {}
        self.paired: list[str] = []
        self.refusal: Exception | None = None
        self.breaks_over: tuple[str, str] | None = None  # of which prompt, and when
        self.changed = asyncio.Event()

    def pair(self, decode: NodeId, address: str) -> None:
        self.paired.append(decode.name)

    def open(self, request: SequenceRequest, handoff: Handoff) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.opened[request.sequence_id] = request
        self._note("open", request.sequence_id)

    def chunk_computed(self, name: str, num_tokens: int, table: Sequence[int], done: Any) -> None:
        self._note("chunk", name, num_tokens)

    def commit(self, name: str, first_token_id: int) -> None:
        self._note("commit", name, first_token_id)

    def abort(self, name: str, *, finished: bool = False) -> None:
        self._note("abort", name)

    def leases(self) -> list[pb.LeaseInfo]:
        return [pb.LeaseInfo(sequence_id=name) for name in self.opened]

    def _note(self, *entry: Any) -> None:
        if entry[:2] == self.breaks_over:
            raise RuntimeError("nobody foresaw this")
        self.log.append(entry)
        self.changed.set()

    def of(self, kind: str) -> list[tuple[Any, ...]]:
        return [entry for entry in self.log if entry[0] == kind]

    async def until(self, kind: str) -> None:
        while not self.of(kind):
            self.changed.clear()
            await self.changed.wait()


class World:
    """Inside a running event loop: the real service, loop and scheduler of a prefill node."""

    def __init__(self, num_blocks: int = 16, num_batched_tokens: int = 8) -> None:
        self.engine = ScriptedEngine(num_blocks)
        self.scheduler = PrefillScheduler(self.engine.block_manager, num_batched_tokens, 8)
        self.hub = SessionHub()
        self.handler = PrefillHandler(cast("Any", self.engine), self.scheduler, self.hub)
        self.observer = PrefillObserver(
            self.engine.block_manager,
            asyncio.get_running_loop(),
            LoadSnapshot(self.scheduler, self.engine.block_manager),
            layers=LayerFacts(num_layers=2, unit_bytes=1, group_bytes=1 << 20, record=lambda: None),
            on_scheduled=self.handler.on_scheduled,
            on_layers=self.handler.on_layers,
            on_step=self.handler.on_step,
        )
        self.loop = EngineLoop(
            self.engine, self.scheduler, self.observer, on_fatal=lambda error: None
        )
        self.sender, self.member = RecordingSender(), FakeMember()
        self.handler.bind(
            self.loop, self.observer, cast("Any", self.sender), cast("Any", self.member)
        )
        self.gateway = Gateway(self.hub)
        self.loop.start()

    def submit(self, request: SequenceRequest, gateway: Gateway | None = None) -> None:
        self.handler.submit((gateway or self.gateway).id, request, HANDOFF)

    async def sending(self, name: str = "a", **options: Any) -> None:
        """Submit a prompt of two chunks and stop the engine inside the second."""
        self.engine.may_step.clear()
        self.submit(request(name, **options))
        await self.engine.held_in_a_step()
        await self.sender.until("open")

    async def check_over(self) -> None:
        await check_all_free(self.loop, self.engine.block_manager)
        assert not (await self.handler.inspect()).sequences
        assert self.observer.num_held_sequences == 0


def run(body: Callable[[World], Awaitable[None]], **options: Any) -> None:
    run_world(lambda: World(**options), body)


def test_a_prompt_is_sent_in_chunks_streams_its_first_token_then_is_handed_off() -> None:
    async def body(world: World) -> None:
        world.submit(request("a", 9))
        await world.sender.until("commit")
        assert [entry[0] for entry in world.sender.log] == ["open", "chunk", "chunk", "commit"]
        assert [entry[2] for entry in world.sender.of("chunk")] == [8, 9]
        (first,) = await world.gateway.published()
        assert first.token_ids == (world.sender.of("commit")[0][2],)
        assert first.finish_reason is None
        world.handler.on_committed("a")
        (handed_off,) = await world.gateway.published()
        assert handed_off.handed_off
        world.handler.on_sources_free("a")
        await world.check_over()

    run(body)


def test_source_blocks_stay_held_until_nothing_reads_them() -> None:
    async def body(world: World) -> None:
        world.submit(request("a", 9))
        await world.sender.until("commit")
        world.handler.on_committed("a")
        await settle(world.loop)
        assert world.engine.block_manager.num_held_blocks == 3
        world.handler.on_sources_free("a")
        await world.check_over()

    run(body)


def test_a_prompt_that_wants_one_token_is_never_handed_off() -> None:
    async def body(world: World) -> None:
        world.submit(request("a", max_tokens=1))
        (ending,) = await world.gateway.until_end()
        assert ending.finish_reason is FinishReason.LENGTH
        assert world.sender.log == []
        await world.check_over()

    run(body)


def test_its_decode_node_is_connected_while_a_prompt_still_queues() -> None:
    async def body(world: World) -> None:
        await world.sending("running")
        world.submit(request("a"))
        assert world.sender.paired == ["decode-0", "decode-0"]
        assert world.sender.of("open") == [("open", "running")]
        world.handler.cancel("a")
        world.handler.cancel("running")
        world.engine.may_step.set()
        world.handler.on_sources_free("running")
        await world.check_over()

    run(body)


def test_cancel_while_queued_frees_it_without_a_word_to_the_sender() -> None:
    async def body(world: World) -> None:
        await world.sending("running")
        world.submit(request("a"))
        world.handler.cancel("a")
        world.engine.may_step.set()
        await world.sender.until("commit")
        assert {entry[1] for entry in world.sender.log} == {"running"}
        world.handler.on_committed("running")
        world.handler.on_sources_free("running")
        await world.check_over()

    run(body)


def test_cancel_while_sending_withdraws_once_and_publishes_nothing() -> None:
    async def body(world: World) -> None:
        await world.sending(num_tokens=40)
        world.handler.cancel("a")
        world.handler.cancel("a")
        world.engine.may_step.set()
        await settle(world.loop)
        assert world.sender.of("chunk") == [("chunk", "a", 8)], "what is left is not computed"
        assert world.sender.of("abort") == [("abort", "a")]
        assert world.sender.of("commit") == []
        assert world.engine.block_manager.num_held_blocks > 0, "a send may still read them"
        assert await world.gateway.published() == []
        world.handler.on_sources_free("a")
        await world.check_over()

    run(body)


def test_a_failed_step_ends_its_prompt_typed_and_withdraws_its_transfer_once() -> None:
    async def body(world: World) -> None:
        await world.sending()
        world.engine.is_failing = True
        world.engine.may_step.set()
        ending = (await world.gateway.until_end())[-1]
        assert ending.error is not None
        assert ending.error.code == "internal"
        assert world.sender.of("abort") == [("abort", "a")]
        world.handler.on_failed("a", TransferFailed("late"))
        assert await world.gateway.published() == [], "one ending only"
        world.handler.on_sources_free("a")
        await world.check_over()

    run(body)


def test_a_failed_transfer_ends_the_prompt_with_its_error_and_stops_computing() -> None:
    async def body(world: World) -> None:
        await world.sending()
        world.handler.on_failed("a", TransferFailed("The link broke.", reason="link_lost"))
        world.handler.on_sources_free("a")
        world.engine.may_step.set()
        (ending,) = await world.gateway.published()
        assert ending.error is not None
        assert ending.error.reason == "link_lost"
        await world.check_over()
        assert world.sender.of("commit") == []

    run(body)


@pytest.mark.parametrize("refusal", [ValueError("twice"), TransferFailed("no such node")])
def test_a_hand_off_that_cannot_be_opened_ends_the_prompt(refusal: Exception) -> None:
    async def body(world: World) -> None:
        world.sender.refusal = refusal
        world.submit(request("a"))
        ending = (await world.gateway.until_end())[-1]
        assert ending.error is not None
        assert world.sender.log == []
        await world.check_over()

    run(body)


@pytest.mark.parametrize("kind", ["open", "chunk", "commit"])
def test_a_sender_that_breaks_over_one_prompt_of_a_step_hears_of_the_others(kind: str) -> None:
    async def body(world: World) -> None:
        world.sender.breaks_over = (kind, "a")
        world.engine.may_step.clear()
        for name in ("a", "b"):
            world.submit(request(name, 4))
        world.engine.may_step.set()
        deltas = await world.gateway.until_end()
        assert [delta.sequence_id for delta in deltas if delta.error is not None] == ["a"]
        await world.sender.until("commit")
        assert [entry[1] for entry in world.sender.of("commit")] == ["b"]
        world.handler.on_committed("b")
        for name in ("a", "b"):
            world.handler.on_sources_free(name)
        await world.check_over()

    run(body)


def test_a_gateway_that_goes_ends_all_prompts_also_when_the_sender_breaks_over_one() -> None:
    async def body(world: World) -> None:
        await world.sending("a")
        world.submit(request("b"))
        world.sender.breaks_over = ("abort", "a")
        world.gateway.leave()
        world.handler.gateway_gone(world.gateway.id)
        world.engine.may_step.set()
        world.handler.on_sources_free("a")
        await world.check_over()

    run(body)


def test_a_gateway_that_goes_takes_all_of_its_prompts_and_no_others() -> None:
    async def body(world: World) -> None:
        other = Gateway(world.hub, "gateway-2")
        await world.sending("a")
        world.submit(request("b"))
        world.submit(request("c", max_tokens=1), other)
        world.gateway.leave()
        world.handler.gateway_gone(world.gateway.id)
        world.engine.may_step.set()
        (ending,) = await other.until_end()
        assert ending.sequence_id == "c"
        assert world.sender.of("abort") == [("abort", "a")]
        world.handler.on_sources_free("a")
        await world.check_over()

    run(body)


def test_a_deadline_ends_a_queued_prompt_and_one_that_is_sent() -> None:
    async def body(world: World) -> None:
        await world.sending("sent", deadline=5.0)
        world.submit(request("queued", deadline=5.0))
        advance_timers(10.0)
        endings = await world.gateway.until_end() + await world.gateway.until_end()
        assert {delta.sequence_id for delta in endings} == {"sent", "queued"}
        assert all(d.error and d.error.code == "deadline_exceeded" for d in endings)
        assert world.sender.of("abort") == [("abort", "sent")]
        world.engine.may_step.set()
        world.handler.on_sources_free("sent")
        await world.check_over()

    run(body)


def test_the_decode_node_is_told_what_is_left_of_the_deadline() -> None:
    async def body(world: World) -> None:
        world.submit(request("a", deadline=1000.0))
        await world.sender.until("open")
        told = world.sender.opened["a"].deadline_seconds
        assert told is not None
        assert 0 < told < 1000.0
        await world.sender.until("commit")
        world.handler.on_committed("a")
        world.handler.on_sources_free("a")
        await world.check_over()

    run(body)


def test_a_prompt_that_can_never_fit_is_refused_typed() -> None:
    async def body(world: World) -> None:
        world.submit(request("a", 100))
        (ending,) = await world.gateway.until_end()
        assert ending.error is not None
        assert ending.error.code == "context_length_exceeded"
        await world.check_over()

    run(body, num_blocks=4)


def test_an_unexpected_error_while_queueing_ends_the_prompt_too() -> None:
    async def body(world: World) -> None:
        def add(sequence: Any) -> None:
            raise RuntimeError("a defect")

        world.scheduler.add = add  # type: ignore[method-assign]
        world.submit(request("a"))
        (ending,) = await world.gateway.until_end()
        assert ending.error is not None
        assert ending.error.code == "internal"
        await world.check_over()

    run(body)


def test_what_cannot_be_taken_is_refused_before_any_work() -> None:
    async def body(world: World) -> None:
        with pytest.raises(InvalidRequest):
            world.handler.submit(world.gateway.id, request("a"), None)
        await world.sending("a")
        with pytest.raises(InvalidRequest):
            world.submit(request("a"))
        world.member.state = NodeState.DRAINING
        with pytest.raises(NodeUnavailable):
            world.submit(request("b"))
        assert world.handler.num_prompts == 1

    run(body)


def test_inspect_shows_what_is_queued_and_what_is_sent() -> None:
    async def body(world: World) -> None:
        await world.sending("a")
        world.submit(request("b"))
        reply = await world.handler.inspect()
        assert [(s.sequence_id, s.status) for s in reply.sequences] == [
            ("a", "sending"),
            ("b", "queued"),
        ]
        assert [lease.sequence_id for lease in reply.leases] == ["a"]

    run(body)


def test_the_log_says_under_the_id_of_the_request_how_each_prompt_ended(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def body(world: World) -> None:
        for name in ("a", "b"):
            world.hub.log.taken(request(name))
        world.submit(request("a", 9))
        await world.sender.until("commit")
        world.handler.on_committed("a")
        world.handler.on_sources_free("a")
        world.submit(request("b"))
        world.handler.cancel("b")
        await settle(world.loop)

    with caplog.at_level("INFO"):
        run(body)
    ends = [each.__dict__ for each in caplog.records if each.getMessage() == "a sequence ended"]
    told = [(each["request_id"], each["sequence_id"], each["outcome"]) for each in ends]
    assert told == [("request-a", "a", "handed off"), ("request-b", "b", "cancelled")]
    assert ends[0]["to"] == HANDOFF.decode.name


def test_a_prompt_whose_fetch_breaks_is_computed_all_the_same() -> None:
    class Breaking:
        async def fetch(self, sequence: Any, holder: PrefixHolder) -> None:
            raise RuntimeError("a defect")

    async def body(world: World) -> None:
        world.handler._fetches = cast("Any", Breaking())
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        holder = PrefixHolder(HANDOFF.decode, "127.0.0.1:1", 8, 8)
        world.handler.submit(world.gateway.id, request("a"), replace(HANDOFF, holder=holder))
        await world.sender.until("commit")
        world.handler.on_committed("a")
        world.handler.on_sources_free("a")
        await world.check_over()

    run(body)
