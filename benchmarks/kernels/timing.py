"""How long one call takes: the median of replayed CUDA graphs.

A graph holds many calls that take turns over copies of their inputs. Together these exceed the
second-level cache, so that a call finds its inputs in memory, as a layer of a model does.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

Call: TypeAlias = Callable[[], object]
MakeCall: TypeAlias = Callable[[], Call]

CACHE_BYTES = 128 << 20
MAX_COPIES = 32
MATMUL_COPIES = 4
REPLAYS = 25
MAX_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Case:
    """One figure. `make` allocates one set of inputs and returns the call to time.

    num_bytes: those that must move, each operand once. num_flops: those that must be computed.
    Both may be given: the slower of the two limits is the floor. make_peer, peer: the opponent
    for the same task and its name; it may raise RuntimeError where the GPU or torch lacks it.
    """

    name: str
    make: MakeCall
    num_bytes: int = 0
    num_flops: int = 0
    peer: str = ""
    make_peer: MakeCall | None = None

    @property
    def num_copies(self) -> int:
        if not self.num_bytes:
            return MATMUL_COPIES
        return min(MAX_COPIES, max(1, CACHE_BYTES // self.num_bytes))


def graph_seconds(make: MakeCall, copies: int) -> float:
    """Seconds of one call of `make`'s, called in turn over `copies` sets of inputs."""
    calls = [make() for _ in range(copies)]
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return median_seconds(graph.replay) / copies


def median_seconds(run: Call, repeats: int = REPLAYS) -> float:
    """Seconds between two events around `run`, after one run that is not counted.

    Long runs are repeated less often, five times at least.
    """
    start, stop = (torch.Event("cuda", enable_timing=True) for _ in range(2))
    samples: list[float] = []
    total = 0.0
    for number in range(repeats + 1):
        start.record()
        run()
        stop.record()
        stop.synchronize()
        if number > 0:
            samples.append(start.elapsed_time(stop) / 1e3)
            total += samples[-1]
        if total > MAX_SECONDS and len(samples) >= 5:
            break
    return statistics.median(samples)
