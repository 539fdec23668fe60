from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest

from loadtest.schedule import dispatch, plan_arrivals


def test_the_same_seed_plans_the_same_arrivals_and_another_seed_others() -> None:
    assert plan_arrivals(50, 4.0, 1.0, 7) == plan_arrivals(50, 4.0, 1.0, 7)
    assert plan_arrivals(50, 4.0, 1.0, 7) != plan_arrivals(50, 4.0, 1.0, 8)


@pytest.mark.parametrize("burstiness", [5e-324, 1e-300, 0.3, 1.0, 5.0, 1e308, math.inf])
def test_arrivals_ascend_and_the_last_is_at_count_over_rate(burstiness: float) -> None:
    times = plan_arrivals(200, 8.0, burstiness, 1)
    assert times == sorted(times)
    assert times[0] > 0.0
    assert times[-1] == pytest.approx(25.0)


def test_burstiness_is_the_shape_of_the_gaps() -> None:
    def spread(burstiness: float) -> float:
        gaps = np.diff(plan_arrivals(20_000, 1.0, burstiness, 3))
        return float(gaps.std() / gaps.mean())

    assert spread(1.0) == pytest.approx(1.0, rel=0.05)
    assert spread(4.0) == pytest.approx(0.5, rel=0.05)
    assert spread(math.inf) == pytest.approx(0.0, abs=1e-6)


def test_an_infinite_rate_sends_all_at_once() -> None:
    assert plan_arrivals(3, math.inf, 1.0, 0) == [0.0, 0.0, 0.0]


def test_requests_start_at_their_planned_times_and_a_late_one_does_not_move_the_next() -> None:
    now, started = 0.0, []

    async def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    async def start_one(index: int) -> None:
        nonlocal now
        started.append((index, now))
        if index == 1:
            now += 2.5  # something held this one up

    asyncio.run(dispatch([1.0, 2.0, 3.0, 6.0], start_one, clock=lambda: now, sleep=sleep))
    assert started == [(0, 1.0), (1, 2.0), (2, 4.5), (3, 6.0)]
