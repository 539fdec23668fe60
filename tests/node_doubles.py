"""An engine without a model, a gateway that listens, and a membership that is told its state:
what the tests of both nodes' services put around the real scheduler, loop and block manager.
"""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from cluster.delta_codec import decode_delta
from cluster.errors import InternalError
from cluster.node import NodeState
from cluster.proto import node_pb2 as pb
from cluster.request import SamplingParams, SequenceRequest, TokenDelta
from engine.block_manager import BlockManager
from engine.step_pipeline import StepOutput
from tests.sequences import Flight, collect_step, land_step, launch_step

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from cluster.session_hub import SessionHub
    from engine.loop import EngineLoop
    from engine.schedule import ScheduleDecision

BLOCK_SIZE = 4
GATEWAY = "gateway-1"
WAIT_SECONDS = 20


def request(
    name: str, num_tokens: int = 9, *, max_tokens: int = 4, deadline: float | None = None
) -> SequenceRequest:
    return SequenceRequest(
        sequence_id=name,
        request_id=f"request-{name}",
        prompt_token_ids=tuple(range(num_tokens)),
        sampling=SamplingParams(max_tokens=max_tokens, seed=0),
        deadline_seconds=deadline,
    )


class ScriptedEngine:
    """Steps as the real one does, with invented tokens. A step can be held back, or made fail."""

    def __init__(self, num_blocks: int) -> None:
        self.block_manager = BlockManager(num_blocks, BLOCK_SIZE)
        self.model_config = SimpleNamespace(vocab_size=1 << 20)
        self.max_model_len = 1 << 16
        self.is_failing = False
        self.overlaps = True
        self._in_flight: list[Flight] = []
        self.is_stepping = threading.Event()
        self.may_step = threading.Event()
        self.may_step.set()

    def launch(self, decision: ScheduleDecision, *, on_layer: object = None) -> Flight:
        flight = launch_step(decision, self.block_manager, can_be_followed=self.overlaps)
        self._in_flight.append(flight)
        return flight

    def collect(self, flight: Flight) -> StepOutput:
        self.is_stepping.set()
        assert self.may_step.wait(WAIT_SECONDS)
        self.is_stepping.clear()
        self._in_flight.remove(flight)
        if self.is_failing:
            for each in (flight, *self._in_flight):
                land_step(each, self.block_manager)
            self._in_flight.clear()
            raise RuntimeError("the device is unhappy")
        outcome = collect_step(flight, self.block_manager)
        deltas = tuple(
            TokenDelta(
                sequence_id=sequence.sequence_id,
                token_ids=(sequence.token_ids[-1],),
                finish_reason=sequence.finish_reason,
            )
            for sequence in outcome.sampled_sequences
        )
        return StepOutput(
            deltas,
            tuple(outcome.sampled_sequences),
            tuple(outcome.finished_sequences),
            outcome.chunks,
        )

    async def held_in_a_step(self) -> None:
        """Wait until the engine's thread hangs in a step; `may_step` must be clear."""
        assert await asyncio.to_thread(self.is_stepping.wait, WAIT_SECONDS)


@dataclass
class FakeMember:
    state: NodeState = NodeState.READY
    model_key: str = "model"
    orders: list[int] = field(default_factory=list)

    def description(self) -> pb.NodeDescription:
        return pb.NodeDescription(name="node")

    def load_message(self) -> pb.NodeLoad:
        return pb.NodeLoad()

    def control(self, action: int) -> str:
        self.orders.append(action)
        return self.state.value


class Gateway:
    """Reads what a node publishes to it, over the real hub."""

    def __init__(self, hub: SessionHub, gateway_id: str = GATEWAY) -> None:
        self.id = gateway_id
        self._hub = hub
        self._session = hub.open(gateway_id)
        self._seen: list[TokenDelta] = []

    async def _next(self) -> TokenDelta:
        while not self._seen:
            frame = await anext(self._session)
            self._seen += [decode_delta(message) for message in frame.step.deltas]
        return self._seen.pop(0)

    async def until(self, is_last: Callable[[TokenDelta], bool]) -> list[TokenDelta]:
        deltas = [await self._next()]
        while not is_last(deltas[-1]):
            deltas.append(await self._next())
        return deltas

    async def until_end(self) -> list[TokenDelta]:
        """Deltas up to the first that ends a sequence."""
        return await self.until(lambda d: d.finish_reason is not None or d.error is not None)

    async def published(self) -> list[TokenDelta]:
        """All that was published up to now."""
        marker = TokenDelta(sequence_id="marker", error=InternalError("marker"))
        self._hub.publish(self.id, [marker])
        return (await self.until(lambda delta: delta.sequence_id == "marker"))[:-1]

    def leave(self) -> None:
        self._hub.close(self._session)


def advance_timers(seconds: float) -> None:
    """Let the running loop's clock jump: what was to happen within `seconds` happens now."""
    loop = asyncio.get_running_loop()
    before = loop.time
    loop.time = lambda: before() + seconds  # type: ignore[method-assign]


class World(Protocol):
    """The real service, loop and scheduler of a node around a `ScriptedEngine`."""

    engine: ScriptedEngine
    loop: EngineLoop


W = TypeVar("W", bound=World)


def run_world(make: Callable[[], W], body: Callable[[W], Awaitable[None]]) -> None:
    """`make` it inside a running event loop; its engine ends with the test."""

    async def bounded() -> None:
        world = make()
        try:
            async with asyncio.timeout(30):
                await body(world)
        finally:
            world.engine.may_step.set()
            world.loop.stop()

    asyncio.run(bounded())


async def settle(loop: EngineLoop) -> None:
    """Let the engine's thread and this loop answer each other until both have nothing to say."""
    for _ in range(4):
        await asyncio.wrap_future(loop.call(lambda: None))


async def check_all_free(loop: EngineLoop, block_manager: BlockManager) -> None:
    """Soon: what is answered on this loop may still have a word with the engine's thread."""

    def check() -> Any:
        block_manager.check_integrity()
        return block_manager.num_free_blocks, block_manager.num_blocks

    for _ in range(1000):
        await settle(loop)
        free, total = await asyncio.wrap_future(loop.call(check))
        if free == total:
            return
        await asyncio.sleep(0.001)
    raise AssertionError("blocks are still held")
