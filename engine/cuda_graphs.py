"""Decode steps as CUDA graphs.

Life of the graphs
    1. Three for each padded number of rows, captured at start, the largest first so that the
       smaller ones reuse its memory. The first makes the inputs of the rows and runs all layers,
       the others compute the logits and draw, one for rows that all take their best token.
    2. A step of n sequences takes the smallest ones with at least n rows. What the host says of
       them was uploaded to where the first graph reads it.
    3. Neither draws when the host has to change the logits before the draw.
    4. Rows beyond n are padding: seq_len 0 and slot -1, so they read and write no KV.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as SequenceOf

    from torch.cuda import _POOL_HANDLE

    from cluster.startup import StartupReport

_WARM_UP_RUNS = 2


def capture_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, every eighth to 256, then every 32nd, up to and including `max_num_seqs`."""
    steps = (1, 2, 4, *range(8, 257, 8), *range(288, max_num_seqs + 1, 32))
    sizes = [size for size in steps if size <= max_num_seqs]
    return sizes if sizes[-1] == max_num_seqs else [*sizes, max_num_seqs]


class DecodeGraphs:
    """The captured decode steps of one model over one KV pool."""

    def __init__(
        self,
        forward: Callable[[int], torch.Tensor],
        draw: Callable[[torch.Tensor, bool], None],
        *,
        sizes: SequenceOf[int],
        device: torch.device,
    ) -> None:
        """`sizes`: numbers of rows, rising. `forward(num_rows)` gives the hidden states of that
        many rows from inputs in memory that does not move; `draw(hidden, only_best)` leaves their
        tokens in such memory."""
        self._forward = forward
        self._draw = draw
        self._device = device
        self._sizes = sizes
        self._size_of = [0] * (sizes[-1] + 1)
        for size in reversed(self._sizes):
            self._size_of[: size + 1] = [size] * (size + 1)
        self._forwards: dict[int, torch.cuda.CUDAGraph] = {}
        self._draws: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self._hidden: dict[int, torch.Tensor] = {}

    @property
    def max_rows(self) -> int:
        """Longer batches have no graph."""
        return self._sizes[-1]

    def padded(self, num_seqs: int) -> int:
        """Rows of the graphs that run `num_seqs` sequences."""
        return self._size_of[num_seqs]

    def capture(self, progress: StartupReport) -> None:
        """The inputs in memory must be those of padding."""
        with progress.phase("capture graphs", total=len(self._sizes)) as phase:
            pool = torch.cuda.graph_pool_handle()
            stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            for size in reversed(self._sizes):
                self._warm_up_and_capture(size, pool, stream)
                phase.advance(1)
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()

    def replay(self, num_rows: int) -> torch.Tensor:
        """Hidden states `[num_rows, hidden_size]`, valid until the next replay."""
        self._forwards[num_rows].replay()
        return self._hidden[num_rows]

    def hidden(self, num_rows: int) -> torch.Tensor | None:
        """What `replay` of as many rows gives."""
        return self._hidden.get(num_rows)

    def replay_draw(self, num_rows: int, *, only_best: bool) -> None:
        """Draw from what `replay` of as many rows has just computed. `only_best`: no row has a
        temperature."""
        self._draws[num_rows, only_best].replay()

    def _warm_up_and_capture(
        self, num_rows: int, pool: _POOL_HANDLE, stream: torch.cuda.Stream
    ) -> None:
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_RUNS):  # compiles kernels and makes cuBLAS allocate
                hidden = self._forward(num_rows)
                for only_best in (True, False):
                    self._draw(hidden, only_best)
        self._forwards[num_rows] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._forwards[num_rows], pool=pool, stream=stream):
            self._hidden[num_rows] = self._forward(num_rows)
        for only_best in (True, False):
            draw = self._draws[num_rows, only_best] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(draw, pool=pool, stream=stream):
                self._draw(self._hidden[num_rows], only_best)
