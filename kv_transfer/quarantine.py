"""What could not be taken back, and when a node has lost so much that it must start afresh.

Life of what is kept
    1. A connection was cut, but an operation posted on it did not end in time: nobody knows what
       it may still read or write.
    2. `keep`: its blocks and slots are out of use as long as this process lives, and counted.
    3. Past the share that the operator allows, of blocks or of slots, or when the device itself is
       lost, who watches is told, once. Only a new process has that memory back for sure.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from cluster.errors import InternalError, device_lost

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.errors import ServingError

logger = logging.getLogger(__name__)


class Quarantine:
    """Of one process. `max_share` in (0, 1]. `num_slots`: of all that receives or sends here."""

    def __init__(self, *, num_blocks: int, max_share: float) -> None:
        self.num_slots = 0
        self.num_kept_blocks = 0
        self.num_kept_slots = 0
        self._num_blocks = num_blocks
        self._max_share = max_share
        self._is_lost = False
        self._on_lost: Callable[[ServingError], None] = lambda error: None

    def watch(self, on_lost: Callable[[ServingError], None]) -> None:
        """`on_lost`: this process must end, with this error."""
        self._on_lost = on_lost

    def keep(self, *, num_blocks: int, num_slots: int, peer: str) -> None:
        """These belong to a connection to `peer` that could not be revoked."""
        self.num_kept_blocks += num_blocks
        self.num_kept_slots += num_slots
        logger.error(
            "operations with %s did not end: %d blocks and %d staging slots stay out of use",
            peer, num_blocks, num_slots,
        )  # fmt: skip
        lost_share = max(
            self.num_kept_blocks / self._num_blocks, self.num_kept_slots / self.num_slots
        )
        if lost_share >= self._max_share:
            self._start_afresh(InternalError("Too much KV memory is lost."))

    def lost_device(self) -> None:
        """And with it all memory."""
        self._start_afresh(device_lost())

    def _start_afresh(self, error: ServingError) -> None:
        if not self._is_lost:
            self._is_lost = True
            self._on_lost(error)
