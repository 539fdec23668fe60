"""Memory of one rank that another one maps: KV shards and inboxes.

On a GPU: CUDA IPC (`kernels/peer_memory.py`), mapped for this rank's own device.

On a CPU: anonymous shared memory, whose file descriptor travels over the Unix socket. It has no
name, so nothing is left behind however the processes end.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from typing import Any

import torch

import kernels.peer_memory
from cluster.errors import ConfigError
from kernels.peer_memory import PeerMemoryUnreachable, export

__all__ = ["export", "map_file", "open_peer", "shared_file"]


def open_peer(facts: dict[str, Any], device: torch.device) -> torch.Tensor:
    """As `kernels.peer_memory.open_peer`. Raises `ConfigError` when the two devices cannot reach
    each other's memory."""
    try:
        return kernels.peer_memory.open_peer(facts, device)
    except PeerMemoryUnreachable as error:
        raise ConfigError(
            f"--tensor-parallel-size: {error}", param="tensor_parallel_size"
        ) from error


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
