"""A node keeps its announcement true, whatever its engine, its index or Redis does."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

import pytest

import cluster.member
from cluster.errors import InvalidRequest, NodeUnavailable
from cluster.member import HUNG_SECONDS, Member, MemberSources
from cluster.node import NodeLoad, NodeState
from cluster.prefix_hash import BlockHash
from cluster.proto import node_pb2 as pb
from cluster.redis_client import StoreUnavailable
from cluster.registry import Heartbeat

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from cluster.node import NodeId, NodeInfo

Action = pb.ControlRequest
ONE = BlockHash(bytes(15) + b"1")
TWO = BlockHash(bytes(15) + b"2")


class FakeRegistry:
    """Notes each call; answers, or fails, as told."""

    def __init__(self) -> None:
        self.log: list[tuple[str, NodeState]] = []
        self.answers: list[Heartbeat | Exception] = []
        self.withdrawn: list[NodeId] = []
        self.changed = asyncio.Event()

    async def announce(self, info: NodeInfo) -> None:
        self._note("announce", info)

    async def heartbeat(self, info: NodeInfo) -> Heartbeat:
        self._note("heartbeat", info)
        answer = self.answers.pop(0) if self.answers else Heartbeat.RENEWED
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def withdraw(self, node: NodeId) -> None:
        self.withdrawn.append(node)

    def _note(self, kind: str, info: NodeInfo) -> None:
        self.log.append((kind, info.state))
        self.changed.set()

    async def until(self, count: int) -> None:
        while len(self.log) < count:
            self.changed.clear()
            await self.changed.wait()


class FakeIndex:
    def __init__(self) -> None:
        self.published: list[tuple[list[BlockHash], list[BlockHash]]] = []
        self.answers: list[bool] = []
        self.changed = asyncio.Event()

    async def publish(
        self, node: NodeId, stored: Sequence[BlockHash], removed: Sequence[BlockHash]
    ) -> bool:
        self.published.append((list(stored), list(removed)))
        self.changed.set()
        return self.answers.pop(0) if self.answers else True

    async def until(self, count: int) -> None:
        while len(self.published) < count:
            self.changed.clear()
            await self.changed.wait()


class FakeGateways:
    def __init__(self) -> None:
        self.told: list[NodeState] = []
        self.is_answered = True
        self.num_connected = 2

    def tell(self, state: NodeState) -> None:
        self.told.append(state)


class World:
    def __init__(self, make_node: Callable[..., NodeInfo]) -> None:
        self.gateways = FakeGateways()
        self.registry, self.index = FakeRegistry(), FakeIndex()
        self.is_idle = True
        self.seconds_without_progress = 0.0
        self.num_replaced = 0
        self.replaced = asyncio.Event()
        self.changes: Callable[[bool], Awaitable[Any]] = self._no_changes
        self.asked: list[bool] = []
        sources = MemberSources(
            load=lambda: NodeLoad(num_running=3),
            transports=lambda: ("shm",),
            cache_changes=self._cache_changes,
            is_idle=lambda: self.is_idle,
            on_replaced=self._on_replaced,
            seconds_without_progress=lambda: self.seconds_without_progress,
        )
        self.member = Member(
            make_node(state=NodeState.STARTING),
            cast("Any", self.registry),
            cast("Any", self.index),
            sources,
            self.gateways,
        )

    async def _cache_changes(self, everything: bool) -> Any:
        self.asked.append(everything)
        return await self.changes(everything)

    async def _no_changes(self, everything: bool) -> Any:
        return (), ()

    def _on_replaced(self) -> None:
        self.num_replaced += 1
        self.replaced.set()


@pytest.fixture
def run(
    make_node: Callable[..., NodeInfo], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[World], Awaitable[None]]], None]:
    """Run a test's body with heartbeats that follow each other at once."""
    monkeypatch.setattr(cluster.member, "HEARTBEAT_SECONDS", 0.001)
    monkeypatch.setattr(cluster.member, "DRAIN_POLL_SECONDS", 0.001)

    def runner(body: Callable[[World], Awaitable[None]]) -> None:
        async def bounded() -> None:
            world = World(make_node)
            async with asyncio.timeout(20):
                await body(world)
                await world.member.stop()

        asyncio.run(bounded())

    return runner


def test_its_load_says_how_many_gateways_place_by_it(make_node: Callable[..., NodeInfo]) -> None:
    async def scenario() -> None:
        member = World(make_node).member
        assert member.info.load == NodeLoad(num_running=3, num_gateways=2)
        assert member.load_message().num_gateways == 2

    asyncio.run(scenario())


def test_a_member_announces_itself_then_beats_and_withdraws_at_the_end(run: Any) -> None:
    async def body(world: World) -> None:
        world.member.start("127.0.0.1:9", "127.0.0.1:10")
        await world.registry.until(3)
        kinds = [kind for kind, _ in world.registry.log[:3]]
        assert kinds == ["announce", "heartbeat", "heartbeat"]
        assert world.registry.log[0][1] is NodeState.READY
        assert world.member.info.grpc_address == "127.0.0.1:9"
        assert world.member.info.load.num_running == 3
        await world.member.stop()
        assert world.registry.withdrawn == [world.member.info.id]

    run(body)


def test_heartbeats_go_on_while_the_engine_does_not_answer(run: Any) -> None:
    async def body(world: World) -> None:
        never = asyncio.Event()

        async def hang(everything: bool) -> Any:
            await never.wait()

        world.changes = hang
        world.member.start("a:1", "")
        await world.registry.until(5)
        assert world.asked == [False]

    run(body)


@pytest.mark.parametrize("error", [StoreUnavailable("away"), RuntimeError("a defect")])
def test_a_heartbeat_that_fails_is_followed_by_the_next(run: Any, error: Exception) -> None:
    async def body(world: World) -> None:
        world.registry.answers = [error]
        world.member.start("a:1", "")
        await world.registry.until(4)

    run(body)


def test_an_error_of_the_engine_does_not_end_the_publishing(run: Any) -> None:
    async def body(world: World) -> None:
        async def fail_once(everything: bool) -> Any:
            if len(world.asked) == 1:
                raise RuntimeError("a defect")
            return (ONE,), ()

        world.changes = fail_once
        world.member.start("a:1", "")
        await world.index.until(1)
        assert world.asked[:2] == [False, True], "what was lost is asked for again"

    run(body)


def test_what_the_index_did_not_take_is_published_again_in_full(run: Any) -> None:
    async def body(world: World) -> None:
        async def changes(everything: bool) -> Any:
            return ((ONE, TWO), ()) if everything else ((TWO,), ())

        world.changes = changes
        world.index.answers = [False]
        world.member.start("a:1", "")
        await world.index.until(3)
        assert [stored for stored, _ in world.index.published[:3]] == [[TWO], [ONE, TWO], [TWO]]

    run(body)


def test_all_is_published_again_after_the_registry_forgot_us(run: Any) -> None:
    async def body(world: World) -> None:
        world.registry.answers = [Heartbeat.RESTORED]
        world.member.start("a:1", "")
        await world.index.until(1)
        assert True in world.asked

    run(body)


def test_a_member_whose_name_was_taken_says_so_and_beats_no_more(run: Any) -> None:
    async def body(world: World) -> None:
        world.registry.answers = [Heartbeat.REPLACED]
        world.member.start("a:1", "")
        await world.replaced.wait()
        beats = len(world.registry.log)
        world.member.control(Action.CORDON)
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(world.registry.log) == beats
        assert world.num_replaced == 1

    run(body)


def test_orders_change_the_state_and_the_cluster_hears_of_it(run: Any) -> None:
    async def body(world: World) -> None:
        world.member.start("a:1", "")
        assert world.member.control(Action.CORDON) == "cordoned"
        while world.registry.log[-1:] != [("heartbeat", NodeState.CORDONED)]:
            await world.registry.until(len(world.registry.log) + 1)
        assert world.member.control(Action.UNCORDON) == "ready"
        with pytest.raises(InvalidRequest):
            world.member.control(Action.ACTION_UNSPECIFIED)

    run(body)


def test_a_drain_is_over_only_once_nothing_runs(run: Any) -> None:
    async def body(world: World) -> None:
        world.member.start("a:1", "")
        world.is_idle = False
        assert world.member.control(Action.DRAIN) == "draining"
        assert not await world.member.drained(0.01)
        assert world.member.control(Action.DRAIN) == "draining"
        world.is_idle = True
        assert await world.member.drained(20)
        assert world.member.control(Action.DRAIN) == "drained"

    run(body)


def test_gateways_hear_of_every_change_at_once(run: Any) -> None:
    async def body(world: World) -> None:
        world.member.start("a:1", "")
        world.is_idle = False
        for action in (Action.CORDON, Action.UNCORDON, Action.DRAIN, Action.UNCORDON):
            world.member.control(action)
        told = [state.value for state in world.gateways.told]
        assert told == ["ready", "cordoned", "ready", "draining", "ready"]

    run(body)


def test_a_node_does_not_go_before_the_gateways_know_that_it_does(run: Any) -> None:
    """It may be idle, and prompts wait for it elsewhere: they are to be missed in order."""

    async def body(world: World) -> None:
        world.member.start("a:1", "")
        world.gateways.is_answered = False
        assert not await world.member.drained(0.01)
        assert world.member.state is NodeState.DRAINING
        world.gateways.is_answered = True
        assert await world.member.drained(20)
        assert world.gateways.told[-2:] == [NodeState.DRAINING, NodeState.DRAINED]

    run(body)


def test_a_node_does_not_go_before_its_last_words_have_been_read(run: Any) -> None:
    async def body(world: World) -> None:
        world.member.start("a:1", "")
        tell = world.gateways.tell

        def tell_slowly(state: NodeState) -> None:
            tell(state)
            world.gateways.is_answered = state is not NodeState.DRAINED

        world.gateways.tell = tell_slowly  # type: ignore[method-assign]
        leaving = asyncio.create_task(world.member.drained(20))
        while world.member.state is not NodeState.DRAINED:  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.001)
        assert not leaving.done()
        world.gateways.is_answered = True
        assert await leaving

    run(body)


def test_a_cordon_does_not_take_a_drain_back(run: Any) -> None:
    async def body(world: World) -> None:
        world.member.start("a:1", "")
        world.is_idle = False
        world.member.drain()
        world.member.cordon()
        assert world.member.state is NodeState.DRAINING

    run(body)


def test_an_uncordon_takes_a_drain_back(run: Any) -> None:
    async def body(world: World) -> None:
        world.member.start("a:1", "")
        world.is_idle = False
        world.member.drain()
        assert world.member.control(Action.UNCORDON) == "ready"
        world.is_idle = True
        assert await world.member.drained(20), "a later drain works"

    run(body)


def test_no_uncordon_takes_back_the_drain_of_a_process_that_ends(run: Any) -> None:
    """It would end at once then, and what still ran be cut."""

    async def body(world: World) -> None:
        world.member.start("a:1", "")
        world.is_idle = False
        leaving = asyncio.create_task(world.member.drained(20))
        await asyncio.sleep(0)
        with pytest.raises(NodeUnavailable):
            world.member.control(Action.UNCORDON)
        assert (world.member.state, leaving.done()) == (NodeState.DRAINING, False)
        world.is_idle = True
        assert await leaving

    run(body)


def test_a_node_whose_engine_hangs_does_not_say_that_it_lives(run: Any) -> None:
    async def body(world: World) -> None:
        world.seconds_without_progress = HUNG_SECONDS
        assert world.member.description().name
        world.seconds_without_progress = HUNG_SECONDS + 1
        with pytest.raises(NodeUnavailable):
            world.member.description()

    run(body)
