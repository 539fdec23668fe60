"""GPU memory of one process that another one maps, by CUDA IPC.

`export` describes an allocation as plain JSON, `open_peer` maps it into this process *for a
device of its own*, so that its kernels reach it, over NVLink if it is another GPU's. The exporter
must keep the tensor as long as anybody maps it; should its process end, the memory stays until it
is unmapped.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch


class PeerMemoryUnreachable(RuntimeError):
    """The memory is on another machine, or the two devices cannot reach each other's."""


def export(tensor: torch.Tensor) -> dict[str, Any]:
    """A contiguous CUDA tensor as facts that fit in JSON; see `open_peer`."""
    storage = tensor.untyped_storage()
    (_, handle, size, offset, counter, counter_offset, event, needs_event) = storage._share_cuda_()  # type: ignore[no-untyped-call]
    return {
        "handle": handle.hex(),
        "size": size,
        "offset": offset,
        "counter": counter.hex(),
        "counter_offset": counter_offset,
        "event": event.hex(),
        "needs_event": needs_event,
        "begin": tensor.storage_offset() * tensor.element_size(),
        "num_bytes": tensor.numel() * tensor.element_size(),
    }


def open_peer(facts: dict[str, Any], device: torch.device) -> torch.Tensor:
    """uint8 `[num_bytes]`: the memory of another process, as `device` sees it. It is unmapped with
    the last tensor over it.

    Raises `PeerMemoryUnreachable`; `KeyError`, `TypeError` or `ValueError` for facts of another
    form.
    """
    counter, event = bytes.fromhex(facts["counter"]), bytes.fromhex(facts["event"])
    handle = bytes.fromhex(facts["handle"])
    try:
        storage = torch.UntypedStorage._new_shared_cuda(
            device.index,
            handle,
            facts["size"],
            facts["offset"],
            counter,
            facts["counter_offset"],
            event,
            facts["needs_event"],
        )
    except RuntimeError as error:
        raise PeerMemoryUnreachable(f"{device} cannot map the memory: {error}") from error
    whole = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
    part = whole[facts["begin"] : facts["begin"] + facts["num_bytes"]]
    _check_extent(part, facts["num_bytes"])
    return part


def _check_extent(memory: torch.Tensor, num_bytes: int) -> None:
    """A kernel that reads beyond what is mapped would end this process. Raises `ValueError`."""
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    address = ctypes.c_uint64(memory.data_ptr())
    status = _driver().cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), address)
    begin = memory.data_ptr() - base.value
    if status != 0 or memory.numel() != num_bytes or not 0 <= begin <= size.value - num_bytes:
        raise ValueError("the memory is smaller than was said")


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
