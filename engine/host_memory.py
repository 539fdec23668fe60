"""The memory of the slots below the KV pool."""

from __future__ import annotations

import numpy as np
import torch

from cluster.errors import ConfigError


class HostMemory:
    """`slots`: uint8 `[num_slots, block_bytes]`. On behalf of a GPU it is pinned: registered in
    place, as torch's own pinned memory is rounded up to a power of two."""

    def __init__(self, num_slots: int, block_bytes: int, device: torch.device) -> None:
        try:
            # The system's zero pages: without a GPU a slot takes memory when it is first written.
            memory = np.zeros((num_slots, block_bytes), dtype=np.uint8)
        except MemoryError:
            raise _no_room(num_slots * block_bytes) from None
        self.slots = torch.from_numpy(memory)
        self._is_pinned = False
        if device.type == "cuda":
            with torch.cuda.device(device):
                error = torch.cuda.cudart().cudaHostRegister(  # type: ignore[no-untyped-call]
                    self.slots.data_ptr(), memory.nbytes, 0
                )
            if int(error) != 0:
                raise _no_room(memory.nbytes)
            self._is_pinned = True

    def free(self) -> None:
        """Idempotent. Nothing copies any more."""
        if self._is_pinned:
            self._is_pinned = False
            torch.cuda.cudart().cudaHostUnregister(self.slots.data_ptr())  # type: ignore[no-untyped-call]


def _no_room(num_bytes: int) -> ConfigError:
    return ConfigError(
        f"--kv-offloading-size asks for {num_bytes / (1 << 30):.1f} GiB of host memory, which "
        f"cannot be had{'' if not torch.cuda.is_available() else ' and pinned'}.",
        param="kv_offloading_size",
    )
