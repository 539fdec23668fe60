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
        gaps = np.ones(num_requests)
    else:
        gaps = rng.standard_gamma(burstiness, num_requests) / burstiness
        gaps = np.maximum(gaps, np.finfo(float).tiny)  # with a shape near 0 all round to 0
    times = np.cumsum(gaps)
    return [float(time) for time in times / times[-1] * (num_requests / rate)]


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
