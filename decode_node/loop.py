"""The engine thread's side of a decode node: report each step, then serve who waits for blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kv_transfer.trace import TRACE

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence

    from cluster.request import TokenDelta
    from decode_node.reservations import Reservations
    from engine.load import LoadSnapshot
    from engine.schedule import ScheduleDecision
    from engine.step_pipeline import StepOutput


class DecodeObserver:
    """Reports steps to the event loop. All methods run on the engine's thread."""

    def __init__(
        self,
        reservations: Reservations,
        loop: asyncio.AbstractEventLoop,
        snapshot: LoadSnapshot,
        *,
        on_step: Callable[[Sequence[TokenDelta]], None],
    ) -> None:
        self._reservations = reservations
        self._loop = loop
        self._snapshot = snapshot
        self._on_step = on_step

    def before_step(self, decision: ScheduleDecision) -> None:
        self._reservations.before_step()
        if TRACE.is_on:
            TRACE.mark("d.launch")

    def after_step(self, decision: ScheduleDecision, output: StepOutput) -> None:
        """The deltas come with `settled`, after finished sequences are freed."""
        if TRACE.is_on:
            TRACE.mark("d.computed")

    def settled(self, deltas: Sequence[TokenDelta]) -> None:
        if deltas:
            self._loop.call_soon_threadsafe(self._on_step, deltas)
        self._reservations.retry()
        self._snapshot.take_sometimes()

    def idle(self) -> None:
        """Nothing runs whose step would ask again: a copy to host memory or a prefix for another
        node may have given back what a hand-off waits for."""
        self._reservations.retry()
        self._snapshot.take()
