"""When each request starts. Planned before the first is sent, so answers cannot slow it.

Gaps follow Gamma(shape = burstiness, mean = 1/rate): shape 1 is a Poisson process, infinite
shape constant gaps. They are stretched so that the last of N requests starts at N/rate.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from cluster.clock import Clock

# Prompts draw from the plain seed; arrivals must not repeat that stream.
_ARRIVALS_STREAM = 1


def plan_arrivals(num_requests: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Start times in seconds from the beginning, ascending; all 0 at an infinite rate."""
    if math.isinf(rate) or num_requests == 0:
        return [0.0] * num_requests
    rng = np.random.default_rng([seed, _ARRIVALS_STREAM])
    if math.isinf(burstiness):
        gaps = np.full(num_requests, 1.0 / rate)
    else:
        gaps = rng.gamma(burstiness, 1.0 / (rate * burstiness), num_requests)
    times = np.cumsum(gaps)
    stretch = (num_requests / rate) / float(times[-1])
    return [float(time) for time in times * stretch]


async def dispatch(
    arrivals: Sequence[float],
    start_one: Callable[[int], Awaitable[None]],
    *,
    clock: Clock,
    sleep: Callable[[float], Awaitable[None]],
) -> None:
    """Call `start_one(index)` at each planned time on a clock that reads 0 at the start.

    `start_one` returns once the request is on its way. It waits only where a limit of
    concurrency was asked for; later requests then start late, and their delay is measured.
    """
    for index, planned in enumerate(arrivals):
        early = planned - clock()
        if early > 0.0:
            await sleep(early)
        await start_one(index)
