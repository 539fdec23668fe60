"""The engine thread's side of a prefill node: what a step means for the hand-off.

Life of a prompt, as this thread sees it
    1. First scheduled: the service is told, and asks the decode node for blocks meanwhile.
    2. With each chunk: the blocks it completes are put under a `Hold` of the transfer. The service
       is told of them, a group of layers at a time while the chunk computes, or all of it after
       a chunk that is too small for that; it sends them meanwhile.
    3. First token sampled: the scheduler lets go of the sequence. Its blocks live on under
       the holds, until the service says that nothing reads them any more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prefill_node.layer_groups import group_ends

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence

    from cluster.request import TokenDelta
    from engine.block_manager import BlockManager
    from engine.load import LoadSnapshot
    from engine.reservation import Hold
    from engine.schedule import ScheduledChunk, ScheduleDecision
    from engine.step_pipeline import StepOutput


@dataclass(frozen=True, slots=True)
class ComputedChunk:
    """The KV of a sequence's first `num_computed_tokens` tokens is in its blocks.

    `done` is a CUDA event to wait for before reading them, None on the CPU.
    """

    sequence_id: str
    num_computed_tokens: int
    block_table: tuple[int, ...]
    done: Any


@dataclass(frozen=True, slots=True)
class ComputedLayers:
    """Of a chunk, whose `done` counts for nothing, the layers below `layer_end` are written once
    `done` has happened."""

    chunk: ComputedChunk
    layer_end: int
    done: Any


@dataclass(frozen=True, slots=True)
class StepReport:
    chunks: tuple[ComputedChunk, ...]
    deltas: tuple[TokenDelta, ...]


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """What decides the groups of layers. `record` gives an event behind what is queued on the
    current stream, None on the CPU."""

    num_layers: int
    unit_bytes: int  # of one layer of one block
    group_bytes: int
    record: Callable[[], Any]


@dataclass(slots=True)
class SourceHolds:
    """The blocks of one prompt that its transfer may still read."""

    num_held: int = 0
    holds: list[Hold] = field(default_factory=list)


class PrefillObserver:
    """Reports steps to the event loop. All methods run on the engine's thread."""

    def __init__(
        self,
        block_manager: BlockManager,
        loop: asyncio.AbstractEventLoop,
        snapshot: LoadSnapshot,
        *,
        layers: LayerFacts,
        on_scheduled: Callable[[Sequence[str]], None],
        on_layers: Callable[[Sequence[ComputedLayers]], None],
        on_step: Callable[[StepReport], None],
    ) -> None:
        self._layers = layers
        self._on_layers = on_layers
        self._block_manager = block_manager
        self._loop = loop
        self._snapshot = snapshot
        self._on_scheduled = on_scheduled
        self._on_step = on_step
        self._sources: dict[str, SourceHolds] = {}
        self._chunks: tuple[ComputedChunk, ...] = ()

    @property
    def num_held_sequences(self) -> int:
        return len(self._sources)

    def before_step(self, decision: ScheduleDecision) -> None:
        new = [
            chunk.sequence.sequence_id
            for chunk in decision.chunks
            if chunk.sequence.sequence_id not in self._sources
        ]
        if new:
            self._sources.update((sequence_id, SourceHolds()) for sequence_id in new)
            self._loop.call_soon_threadsafe(self._on_scheduled, new)

    def layer_hook(self, decision: ScheduleDecision) -> Callable[[int], None] | None:
        """Hears of the layers of a step. Each chunk that is large enough is reported in groups of
        its own; its blocks are held from here on."""
        if decision.is_decode:
            return None  # one token, by a captured graph
        facts = self._layers
        by_layer: dict[int, list[ComputedChunk]] = {}
        for chunk in decision.chunks:
            ends = self._group_ends(chunk)
            if ends:
                launched = self._launched_chunk(chunk)
                for layer_end in ends:
                    by_layer.setdefault(layer_end, []).append(launched)
        if not by_layer:
            return None
        reports: list[ComputedLayers] = []

        def on_layer(layer: int) -> None:
            layer_end = layer + 1
            if layer_end not in by_layer:
                return
            done = facts.record()
            reports.extend(ComputedLayers(each, layer_end, done) for each in by_layer[layer_end])
            # On a GPU the host is far ahead: one report of all events. On a CPU it is done now.
            if done is None or layer_end == facts.num_layers:
                self._loop.call_soon_threadsafe(self._on_layers, tuple(reports))
                reports.clear()

        return on_layer

    def _group_ends(self, chunk: ScheduledChunk) -> frozenset[int]:
        facts = self._layers
        num_blocks = -(-chunk.num_scheduled_tokens // self._block_manager.block_size)
        return group_ends(facts.num_layers, num_blocks * facts.unit_bytes, facts.group_bytes)

    def _launched_chunk(self, chunk: ScheduledChunk) -> ComputedChunk:
        sequence = chunk.sequence
        num_tokens = sequence.num_computed_tokens + sequence.num_launched_tokens
        num_tokens += chunk.num_scheduled_tokens
        self._hold(sequence.sequence_id, sequence.block_table, num_tokens)
        return ComputedChunk(sequence.sequence_id, num_tokens, tuple(sequence.block_table), None)

    def after_step(self, decision: ScheduleDecision, output: StepOutput) -> None:
        """Hold what was computed, before the scheduler may free it. What was aborted while the
        step was in flight is not there any more."""
        computed = []
        for chunk in output.chunks:
            sequence = chunk.sequence
            self._hold(sequence.sequence_id, sequence.block_table, sequence.num_computed_tokens)
            computed.append(
                ComputedChunk(
                    sequence.sequence_id,
                    sequence.num_computed_tokens,
                    tuple(sequence.block_table),
                    output.done,
                )
            )
        self._chunks = tuple(computed)

    def settled(self, deltas: Sequence[TokenDelta]) -> None:
        self._snapshot.take_sometimes()
        report = StepReport(self._chunks, tuple(deltas))
        self._chunks = ()
        self._loop.call_soon_threadsafe(self._on_step, report)

    def idle(self) -> None:
        self._snapshot.take()

    def release(self, sequence_id: str) -> None:
        """Nothing reads this prompt's blocks any more. Idempotent."""
        for hold in self._sources.pop(sequence_id, SourceHolds()).holds:
            hold.release()

    def _hold(self, sequence_id: str, block_table: Sequence[int], num_tokens: int) -> None:
        source = self._sources[sequence_id]
        num_blocks = -(-num_tokens // self._block_manager.block_size)
        new = block_table[source.num_held : num_blocks]
        if new:
            source.holds.append(self._block_manager.hold(new, f"transfer of {sequence_id}"))
            source.num_held = num_blocks
