"""Where a kernel runs: CUDA tensors go to Triton, CPU tensors to the torch reference beside it.

1. A kernel file decorates its Triton functions with `jit` and asks `runs_triton(tensor)` in its
   public function. `kernel[grid](...)` is then a launch by `launch.py`.
2. On a platform without a Triton wheel the decorated functions stay plain and are never called.
3. Tests enter `interpreted()` in a process started with TRITON_INTERPRET=1: CPU tensors then take
   the Triton path too, executed by Triton's interpreter.

4. A kernel of the decode path may start before the one in front of it has ended, see
   `chained_launch`.

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

from kernels.launch import direct

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:
    triton = tl = gdc_launch_dependents = gdc_wait = None

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "chained_launch",
    "gdc_launch_dependents",
    "gdc_wait",
    "interpreted",
    "is_hopper",
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
    """`triton.jit`, launched by `kernels.launch`; or the function itself where Triton does not
    exist."""
    return function if triton is None else direct(triton.jit(function))


def jit_for_any(*arguments: str) -> Callable[[Callable[..., Any]], Any]:
    """`jit` with one compilation for all values of these integer arguments.

    For what changes from step to step: Triton would compile apart for 1 and for multiples of 16,
    in the middle of serving.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        if triton is None:
            return function
        return direct(triton.jit(function, do_not_specialize=list(arguments)))

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
def chained_launch(device: torch.device) -> bool:
    """Whether kernels on `device` may start before the previous kernel of the stream has ended.

    That is programmatic dependent launch (compute capability 9.0 and newer): it hides what a
    kernel does before it needs the other's results, such as starting to read weights, and the
    launch itself. A kernel that takes part

    1. gets the answer as a `CHAINED: tl.constexpr` and, if true, is launched with
       `launch_pdl=True`;
    2. calls `gdc_launch_dependents()` early: from then on the next kernel may take free places;
    3. calls `gdc_wait()` in every program, before the first read of anything that an earlier
       kernel of the step may have written and before its own first write: then all kernels in
       front of it have ended. Only weights and what the host filled long ago may be read before;
    4. calls both on every path: a program that returns without waiting would let the kernels
       behind it overtake the one in front.

    Kernels that know nothing of it (torch's, for instance) may stand anywhere between.
    """
    if device.type != "cuda" or gdc_wait is None:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 9


@lru_cache(maxsize=16)
def is_hopper(device: torch.device) -> bool:
    """Whether it is a GPU of compute capability 9."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@lru_cache(maxsize=16)
def num_multiprocessors(device: torch.device) -> int:
    """How many thread blocks the device works on at a time (one per multiprocessor)."""
    if device.type != "cuda":
        return _INTERPRETER_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
