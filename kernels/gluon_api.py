"""Gluon by one set of names, whichever Triton is installed; and what its kernels share.

Where Triton is missing or has no Gluon, `HAS_GLUON` is false and the decorated functions stay
plain and are never called.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from kernels.launch import direct

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.ampere import mma_v2
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as _Descriptor

    # By the names of Triton 3.9, or those of 3.6.
    barrier = getattr(gl, "barrier", None) or gl.thread_barrier
    async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
    async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
    _memory = gl.shared_memory_descriptor
    reinterpret = getattr(_memory, "reinterpret", None) or _memory._reinterpret
except ImportError:
    gluon = gl = fence_async_shared = mbarrier = tma = None
    mma_v2 = warpgroup_mma = warpgroup_mma_wait = None
    barrier = async_load = async_store = reinterpret = None
    _Descriptor = object

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

__all__ = [
    "HAS_GLUON",
    "Blocks",
    "async_load",
    "async_store",
    "barrier",
    "fence_async_shared",
    "gl",
    "gluon_constexpr",
    "gluon_jit",
    "gluon_jit_for_any",
    "in_blocks",
    "mbarrier",
    "mma_v2",
    "next_stage",
    "post",
    "read",
    "reinterpret",
    "shared_layout",
    "tma",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]

HAS_GLUON = gluon is not None


def gluon_jit(function: Callable[..., Any]) -> Any:
    """`gluon.jit`, or the function itself where there is no Gluon."""
    return function if gluon is None else direct(gluon.jit(function))


def gluon_constexpr(function: Callable[..., Any]) -> Any:
    """A function that kernels call while they are compiled."""
    return function if gluon is None else gluon.constexpr_function(function)


def gluon_jit_for_any(*arguments: str) -> Callable[[Callable[..., Any]], Any]:
    """`gluon_jit` with one compilation for all values of these integer arguments."""

    def decorate(function: Callable[..., Any]) -> Any:
        if gluon is None:
            return function
        return direct(gluon.jit(function, do_not_specialize=list(arguments)))

    return decorate


@lru_cache(maxsize=16)
def shared_layout(bits: int, rank: int) -> Any:
    """Where the tensor cores take blocks of such elements from. Kept: one takes microseconds."""
    return gl.NVMMASharedLayout(128, bits, rank=rank)


class Blocks(_Descriptor):  # type: ignore[misc]
    """A tensor for the bulk copy engine, which copies it block by block.

    What `TensorDescriptor` takes microseconds to check the driver checks again: strides and
    address are multiples of 16 bytes, the last stride is 1.
    """

    def __init__(
        self,
        base: torch.Tensor,
        shape: Sequence[int],
        strides: Sequence[int],
        block_shape: list[int],
        layout: Any,
    ) -> None:
        self.base = base
        self.shape = shape
        self.strides = strides
        self.block_shape = block_shape
        self.layout = layout


def in_blocks(matrix: torch.Tensor, rows: int, columns: int) -> Blocks:
    """A 16-bit matrix in blocks of so many rows and columns."""
    layout = shared_layout(16, 2)
    return Blocks(matrix, matrix.shape, matrix.stride(), [rows, columns], layout)


@gluon_jit
def post(mail: gl.tensor, value: gl.tensor) -> None:
    """Write a number to a mailbox, shared memory of one int32."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    mail.store(gl.full([1], value, gl.int32, layout=LAYOUT))


@gluon_jit
def read(mail: gl.tensor) -> Any:
    """The number in a mailbox."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.sum(mail.load(LAYOUT), axis=0)


@gluon_jit
def next_stage(stage: gl.tensor, phase: gl.tensor, STAGES: gl.constexpr) -> Any:
    """The stage after this one, and by which phase of its barrier it is waited for."""
    stage += 1
    wraps = stage == STAGES
    return gl.where(wraps, 0, stage), gl.where(wraps, phase ^ 1, phase)
