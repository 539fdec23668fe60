"""Memory of one rank that another one maps: KV shards and inboxes.

On a GPU: CUDA IPC. `export` describes an allocation as plain JSON, `open_peer` maps it into this
process *for this rank's own device*, so that its kernels reach it over NVLink. The exporter must
keep the tensor as long as anybody maps it.

On a CPU: anonymous shared memory, whose file descriptor travels over the Unix socket. It has no
name, so nothing is left behind however the processes end.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from typing import Any

import torch

from cluster.errors import ConfigError


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
    """uint8 `[num_bytes]`: the memory of another process, as `device` sees it.

    Raises `ConfigError` when the two devices cannot reach each other's memory.
    """
    try:
        storage = torch.UntypedStorage._new_shared_cuda(
            device.index,
            bytes.fromhex(facts["handle"]),
            facts["size"],
            facts["offset"],
            bytes.fromhex(facts["counter"]),
            facts["counter_offset"],
            bytes.fromhex(facts["event"]),
            facts["needs_event"],
        )
    except RuntimeError as error:
        raise ConfigError(
            f"--tensor-parallel-size: {device} cannot map the memory of another GPU: {error}",
            param="tensor_parallel_size",
        ) from error
    whole = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
    return whole[facts["begin"] : facts["begin"] + facts["num_bytes"]]


def shared_file(num_bytes: int) -> int:
    """Descriptor of new zeroed memory that other processes may map; the caller closes it."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("baton-kv")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, num_bytes)
    return descriptor


def map_file(descriptor: int, num_bytes: int) -> torch.Tensor:
    """uint8 `[num_bytes]`. A page takes memory when it is first written, by any process."""
    return torch.frombuffer(mmap.mmap(descriptor, num_bytes), dtype=torch.uint8)
