"""Hand-offs between the two processes of `kv_pair.py`: how long each took, and its marks.

What both event loops did before decides a lot: a loop that has slept for 20 ms takes several times
as long to pack and to read. `hand_off` finds them asleep, as the first request after a pause does;
`last_layer` finds them as a node that computes a prompt has them.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kv_transfer.trace import TRACE
from prefill_node.layer_groups import CPU_GROUP_BYTES, GPU_GROUP_BYTES, group_ends

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.kv_pair import Pair, Started
    from kv_transfer.trace import Mark

TICKET_SECONDS = 0.005  # more than a decode node takes to reserve blocks


@dataclass(frozen=True, slots=True)
class Taken:
    """From when to when one took; what both processes marked meanwhile, where they trace."""

    began: float
    ended: float
    marks: tuple[Mark, ...]

    @property
    def seconds(self) -> float:
        return self.ended - self.began


class LayerEvent:
    """Stands for a CUDA event behind a layer: it happens at a moment of the clock. Whoever awaits
    `seen` goes on when the sender has seen it, and has acted."""

    def __init__(self, at: float) -> None:
        self.at = at
        self.seen: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def query(self) -> bool:
        has_happened = time.perf_counter() >= self.at
        if has_happened and not self.seen.done():
            self.seen.set_result(None)
        return has_happened

    def wait(self, stream: object) -> None:
        """A stream has nothing to wait for: the KV of a benchmark is always there."""


async def hand_off(
    pair: Pair, num_blocks: int, num_last: int, gateway_id: str = "gateway"
) -> Taken:
    """From the first token until the start at the other end. All blocks but the last `num_last`
    have left before that."""
    name = pair.open(num_blocks, gateway_id)
    num_early = num_blocks - num_last
    sent = sum(pair.agent.stats.bytes_by_transport.values())
    pair.computed(name, num_early)
    await _left(pair, sent + num_early * pair.options.block_bytes)
    began = time.perf_counter()
    pair.computed(name, num_blocks)
    return _taken(began, await pair.started([name]))


async def last_layer(pair: Pair, num_blocks: int, layer_seconds: float) -> Taken:
    """From the event of a prompt's last layer until the start at the other end. Its layers come
    `layer_seconds` apart and leave in a node's groups, all but the last one before that. The first
    token comes with the last layer: nothing hides how long that takes."""
    options = pair.options
    group_bytes = CPU_GROUP_BYTES if options.source == "cpu" else GPU_GROUP_BYTES
    ends = group_ends(options.num_layers, num_blocks * options.unit_bytes, group_bytes)
    name = pair.open(num_blocks)
    first = time.perf_counter() + TICKET_SECONDS
    # As on a GPU, where the host is far ahead: all events are known before the first has happened.
    for layer_end in sorted(ends | {options.num_layers}):
        event = LayerEvent(first + layer_end * layer_seconds)
        pair.computed(name, num_blocks, layer_end, event)
    await event.seen
    return _taken(event.at, await pair.started([name]))


async def stream(pair: Pair, num_prompts: int, num_blocks: int) -> Taken:
    """From the first frame of several prompts until the last of them started."""
    names = [pair.open(num_blocks) for _ in range(num_prompts)]
    await asyncio.sleep(0.05)  # tickets
    began = time.perf_counter()
    for name in names:
        pair.computed(name, num_blocks)
    return _taken(began, await pair.started(names))


async def _left(pair: Pair, num_bytes: int) -> None:
    """Until so many bytes were sent in all, and the link is quiet again."""
    moved = pair.agent.stats.bytes_by_transport
    while sum(moved.values()) < num_bytes:  # noqa: ASYNC110 (a counter has no event)
        await asyncio.sleep(0.0005)
    await asyncio.sleep(0.02)


def _taken(began: float, started: Sequence[Started]) -> Taken:
    marks: list[Mark] = []
    if TRACE.is_on:
        marks = TRACE.stop()
        TRACE.start()
        for each in started:
            marks += each.marks
    after = tuple(mark for mark in marks if mark.seconds >= began)
    return Taken(began, max(each.at for each in started), after)
