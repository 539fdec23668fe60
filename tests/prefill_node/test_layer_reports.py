"""What the engine's thread says of layers while a step is launched."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

from cluster.prefix_hash import root_hash
from cluster.request import SamplingParams, SequenceRequest
from engine.block_manager import BlockManager
from engine.schedule import ScheduledChunk, ScheduleDecision
from engine.sequence import Sequence
from prefill_node.loop import ComputedLayers, LayerFacts, PrefillObserver

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as SequenceOf

BLOCK_SIZE = 4
NUM_LAYERS = 4
UNIT_BYTES = 10


class Events:
    """Counts instead of recording."""

    def __init__(self, *, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        self.num_recorded = 0

    def record(self) -> object:
        self.num_recorded += 1
        return self.num_recorded if self.on_gpu else None


class World:
    def __init__(self, *, on_gpu: bool) -> None:
        self.manager = BlockManager(64, BLOCK_SIZE)
        self.events = Events(on_gpu=on_gpu)
        self.heard: list[tuple[ComputedLayers, ...]] = []
        self.observer = PrefillObserver(
            self.manager,
            asyncio.get_running_loop(),
            cast("Any", None),
            layers=LayerFacts(NUM_LAYERS, UNIT_BYTES, 40, self.events.record),
            on_scheduled=lambda _: None,
            on_layers=self._hear,
            on_step=lambda _: None,
        )

    def _hear(self, reports: SequenceOf[ComputedLayers]) -> None:
        self.heard.append(tuple(reports))

    def hook(self, *lengths: int) -> Callable[[int], None] | None:
        chunks = []
        for number, length in enumerate(lengths):
            request = SequenceRequest(
                sequence_id=f"s{number}",
                request_id="r",
                prompt_token_ids=tuple(range(length)),
                sampling=SamplingParams(max_tokens=4, seed=0),
            )
            sequence = Sequence(request, block_size=BLOCK_SIZE, root=root_hash("m", b""))
            assert self.manager.allocate(sequence, length)
            chunks.append(ScheduledChunk(sequence, length))
        decision = ScheduleDecision(tuple(chunks))
        self.observer.before_step(decision)
        return self.observer.layer_hook(decision)


def layers_of(reports: SequenceOf[ComputedLayers], name: str) -> list[int]:
    return [each.layer_end for each in reports if each.chunk.sequence_id == name]


def test_each_chunk_is_reported_in_groups_of_its_own_size() -> None:
    async def body() -> None:
        world = World(on_gpu=True)
        on_layer = world.hook(32, 8, 4)  # 80, 20 and 10 bytes a layer, groups of 40
        assert on_layer is not None
        for layer in range(NUM_LAYERS):
            on_layer(layer)
        await asyncio.sleep(0)
        (reports,) = world.heard
        assert layers_of(reports, "s0") == [1, 2, 3, 4]
        assert layers_of(reports, "s1") == [2, 3, 4]
        assert layers_of(reports, "s2") == []  # too small: sent whole, after the step
        assert world.events.num_recorded == NUM_LAYERS
        assert all(each.chunk.num_computed_tokens in (32, 8) for each in reports)

    asyncio.run(body())


def test_where_a_layer_is_written_at_once_it_is_told_at_once() -> None:
    async def body() -> None:
        world = World(on_gpu=False)
        on_layer = world.hook(32)
        assert on_layer is not None
        on_layer(0)
        await asyncio.sleep(0)
        assert [layers_of(reports, "s0") for reports in world.heard] == [[1]]

    asyncio.run(body())


def test_blocks_are_held_from_the_launch_on() -> None:
    async def body() -> None:
        world = World(on_gpu=True)
        assert world.hook(32) is not None
        assert world.manager.num_held_blocks == 8
        world.observer.release("s0")
        assert world.manager.num_held_blocks == 0

    asyncio.run(body())


def test_a_step_of_small_chunks_needs_no_hook() -> None:
    async def body() -> None:
        world = World(on_gpu=True)
        assert world.hook(4, 4, 4) is None
        assert world.manager.num_held_blocks == 0

    asyncio.run(body())
