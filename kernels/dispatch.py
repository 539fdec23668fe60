"""Where a kernel runs: CUDA tensors go to Triton, CPU tensors to the torch reference beside it.

1. A kernel file decorates its Triton functions with `jit` and asks `runs_triton(tensor)` in its
   public function.
2. On a platform without a Triton wheel the decorated functions stay plain and are never called.
3. Tests enter `interpreted()` in a process started with TRITON_INTERPRET=1: CPU tensors then take
   the Triton path too, executed by Triton's interpreter.

A Triton launch uses the current CUDA device, which must be the one of its tensors. Nothing here or
in the kernels waits for the device or reads a CUDA tensor on the host, so every kernel can be
captured in a CUDA graph.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "interpreted",
    "jit",
    "jit_for_any",
    "next_power_of_two",
    "num_multiprocessors",
    "runs_triton",
    "tl",
]

# Triton decides at its import; kernels decorated then stay what they are.
_can_interpret = triton is not None and bool(triton.knobs.runtime.interpret)
_interpreted: ContextVar[bool] = ContextVar("interpreted", default=False)

# What the interpreter pretends to run on: enough to make splitting happen, few enough to be quick.
_INTERPRETER_MULTIPROCESSORS = 8


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, or the function itself where Triton does not exist."""
    return function if triton is None else triton.jit(function)


def jit_for_any(*arguments: str) -> Callable[[Callable[..., Any]], Any]:
    """`jit` with one compilation for all values of these integer arguments.

    For what changes from step to step: Triton would compile apart for 1 and for multiples of 16,
    in the middle of serving.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        if triton is None:
            return function
        return triton.jit(function, do_not_specialize=list(arguments))

    return decorate


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether a kernel over `tensor` is launched through Triton."""
    return tensor.is_cuda or _interpreted.get()


@contextmanager
def interpreted() -> Iterator[None]:
    """Sends CPU tensors through Triton's interpreter; needs TRITON_INTERPRET=1 since start-up."""
    if not _can_interpret:
        raise RuntimeError("set TRITON_INTERPRET=1 before triton is imported")
    token = _interpreted.set(True)
    try:
        yield
    finally:
        _interpreted.reset(token)


def next_power_of_two(n: int) -> int:
    """The smallest power of two >= n, for n >= 1: extents of Triton tiles."""
    return 1 << (n - 1).bit_length()


@lru_cache(maxsize=16)
def num_multiprocessors(device: torch.device) -> int:
    """How many thread blocks the device works on at a time (one per multiprocessor)."""
    if device.type != "cuda":
        return _INTERPRETER_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
