from __future__ import annotations

import asyncio
import time

from cluster.loop_watch import STALL_SECONDS, TICK_SECONDS, LoopWatch


def values(watch: LoopWatch) -> dict[str, float]:
    return {sample.name: sample.value for family in watch.collect() for sample in family.samples}


def test_a_loop_that_was_held_is_counted_with_the_time_it_stood_still() -> None:
    async def scenario() -> None:
        watch = LoopWatch()
        time.sleep(TICK_SECONDS + 2 * STALL_SECONDS)  # noqa: ASYNC251 - what is being tested
        await asyncio.sleep(0.01)
        found = values(watch)
        assert found["baton_event_loop_stalls_total"] == 1
        assert found["baton_event_loop_stalled_seconds_total"] >= 2 * STALL_SECONDS

    asyncio.run(scenario())


def test_small_delays_are_no_stalls_and_the_timer_goes_on() -> None:
    async def scenario() -> None:
        watch = LoopWatch()
        watch.woken(STALL_SECONDS * 0.9)
        assert watch.num_stalls == 0
        watch.woken(STALL_SECONDS)
        watch.woken(STALL_SECONDS)
        assert (watch.num_stalls, watch.stalled_seconds) == (2, 2 * STALL_SECONDS)

    asyncio.run(scenario())


def test_tasks_are_those_of_the_loop() -> None:
    async def scenario() -> None:
        watch = LoopWatch()
        before = values(watch)["baton_event_loop_tasks"]
        waiting = asyncio.create_task(asyncio.Event().wait())
        assert values(watch)["baton_event_loop_tasks"] == before + 1
        waiting.cancel()

    asyncio.run(scenario())
