"""The matrices of one rank: those behind which the ranks must meet.

Each rank multiplies its own columns of `o_proj` and `down_proj`; the sum of the products is the
whole one. Rank 0 alone adds the residual stream and the bias, so the sum is the new stream, on
all ranks alike. Of few rows product and sum are one kernel, where there is one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.models.linear import Linear

if TYPE_CHECKING:
    import torch

    from engine.models.linear import Matrix, MatrixFactory, MatrixSpec
    from engine.tensor_parallel.ranks import Ranks

_SUMMED = ("o_proj", "down_proj")


class SummedMatrix:
    """A `Matrix` that is cut by columns. Only `add_to` is ever asked of it.

    `has_bias`: rank 0 adds one, whatever this rank does.
    """

    __slots__ = ("_matrix", "_ranks", "has_bias")

    def __init__(self, matrix: Matrix, ranks: Ranks, *, has_bias: bool) -> None:
        self._matrix = matrix
        self._ranks = ranks
        self.has_bias = has_bias

    @property
    def own(self) -> Matrix:
        """What this rank multiplies."""
        return self._matrix

    def __call__(self, x: torch.Tensor, spare: torch.Tensor | None = None) -> torch.Tensor:
        return self._ranks.sum(self._matrix(x, spare))

    def normed(self, residual: torch.Tensor, norm_weight: torch.Tensor, eps: float) -> torch.Tensor:
        raise NotImplementedError("the input of this matrix is cut: it cannot be normed here")

    def normed_silu_mul(
        self, residual: torch.Tensor, norm_weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        raise NotImplementedError("the input of this matrix is cut: it cannot be normed here")

    def add_to(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        rank, peers = self._ranks.shard.rank, self._ranks.few_rows
        if peers is not None and isinstance(self._matrix, Linear):
            summed = self._matrix.summed(x, None if rank else residual, peers)
            if summed is not None:
                return summed
        if rank:
            return self._ranks.sum(self._matrix(x, residual))
        return self._ranks.sum(self._matrix.add_to(x, residual))

    def checkpoint_views(self) -> dict[str, torch.Tensor]:
        return self._matrix.checkpoint_views()

    def pack(self) -> None:
        self._matrix.pack()


def sharded_factory(make_matrix: MatrixFactory, ranks: Ranks) -> MatrixFactory:
    """The same factory, but what is cut by columns is summed over the ranks."""

    def make(spec: MatrixSpec) -> Matrix:
        if not all(name.rpartition(".")[2] in _SUMMED for name in spec.parts):
            return make_matrix(spec)
        own = spec._replace(bias=spec.bias and ranks.shard.rank == 0)
        return SummedMatrix(make_matrix(own), ranks, has_bias=spec.bias)

    return make
