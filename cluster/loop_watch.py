"""Watches a process's event loop: how many tasks it has, and when it stood still.

A timer asks to be woken four times a second. When it is woken late, something held the loop: a
long call, a stopped process, a machine without a free core. Nothing else tells that apart from a
slow network, and it is what every deadline of this process depends on.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterator

TICK_SECONDS = 0.25
STALL_SECONDS = 0.5  # later than this is a stall


class LoopWatch(Collector):
    """Watches the running loop from its creation on. Scraped by any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.num_stalls = 0
        self.stalled_seconds = 0.0
        self._arm()

    def woken(self, late_seconds: float) -> None:
        """The timer came that much after its time."""
        if late_seconds >= STALL_SECONDS:
            self.num_stalls += 1
            self.stalled_seconds += late_seconds

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "baton_event_loop_tasks",
            "Tasks of the event loop.",
            value=len(asyncio.all_tasks(self._loop)),
        )
        yield CounterMetricFamily(
            "baton_event_loop_stalls",
            "Times the event loop stood still for half a second or longer.",
            value=self.num_stalls,
        )
        yield CounterMetricFamily(
            "baton_event_loop_stalled_seconds",
            "Time the event loop stood still, summed.",
            value=self.stalled_seconds,
        )

    def _arm(self) -> None:
        self._loop.call_later(TICK_SECONDS, self._tick, self._loop.time() + TICK_SECONDS)

    def _tick(self, due_at: float) -> None:
        self.woken(self._loop.time() - due_at)
        self._arm()
