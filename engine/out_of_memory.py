"""A step for which the device has no memory: it ends its own sequences, and the node goes on.

The pool is sized so that this does not happen; what else uses the GPU may still cause it. Torch's
error becomes a typed one only after the step's frames are gone, and with them its tensors: only
then does emptying the cache give their memory back.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, TypeVar

import torch

from cluster.errors import OutOfMemory

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)
T = TypeVar("T")
# CUDA's driver, Triton and torch's allocator on a CPU have no class for it.
_WORDS = ("out of memory", "DefaultCPUAllocator")


def run_within_memory(run: Callable[[], T]) -> T:
    """What `run` gives; raises `OutOfMemory` when it failed for lack of memory."""
    try:
        return run()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        problem = str(error).partition("\n")[0]
    logger.warning("a step found no memory: %s", problem)
    torch.cuda.empty_cache()  # does nothing where CUDA is not in use
    raise OutOfMemory("The node ran out of memory in this step; try again.", reason="out_of_memory")


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)
