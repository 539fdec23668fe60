"""Launches that a graph holds, beside the same ones made by the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


def replayed_alike(run: Callable[[], torch.Tensor], *, times: int = 10) -> torch.Tensor:
    """What it gives on a GPU; checked to be the same to the bit however often a graph of it is
    replayed, into memory that was spoiled before."""
    eager = run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(times):
        captured.fill_(torch.nan)
        graph.replay()
        assert torch.equal(captured, eager)
    return eager
